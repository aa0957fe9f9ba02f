"""All clients one after the other in this process: for debugging, and for runs too small to be worth any workers."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp

from fedpeft.simulations.grids.base import SERVER_NODE_ID, Answer, SimulationGrid, answer_all, speak_for
from fedpeft.simulations.grids.bundles import Bundle, Job
from fedpeft.simulations.grids.transport import SharedRecords, contents, duplicate, duplicate_arrays
from fedpeft.simulations.grids.work import load_function
from fedpeft.simulations.grids.worker import load_app


class InlineGrid(SimulationGrid):
    """Flower's `Grid` in this process, lazy: a message is pulled and answered when its reply is asked for.

    Parameters
    ----------
    app : ClientApp or str
        The clients' code, or where to import it from, such as ``"fedpeft.clients.app:app"``.
    contexts : mapping of int to Context
        By node id; see `SimulationGrid`.
    threads : int
        torch threads while a client works; the caller's number is restored afterwards. With as many threads as a Ray
        worker has, results are the same to the byte.

    Notes
    -----
    A timeout is looked at between messages only: nothing interrupts a client at work.
    """

    def __init__(self, app: ClientApp | str, contexts: Mapping[int, Context] | None = None, threads: int = 1) -> None:
        super().__init__(contexts)
        self._app = load_app(app) if isinstance(app, str) else app
        self._threads = threads
        self._shared = SharedRecords()

    def map(self, function: str, jobs: Iterable[Any], *shared: Any) -> Iterator[Any]:
        """Call a function with each job in this process, with as many threads as a client has."""
        from fedpeft.models import num_threads

        called = load_function(function)
        for job in jobs:
            with num_threads(self._threads):
                value = called(job, *shared)
            yield value

    def _exchange(self, messages: Iterator[Message], timeout: float | None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        bundles = self.bundling.bundles(messages)
        while deadline is None or time.monotonic() < deadline:
            try:
                bundle = next(bundles)
            except StopIteration:
                return
            for message, answered, state in self._answer(bundle):
                yield self._deliver(message, answered, state)

    def _answer(self, bundle: Bundle) -> list[tuple[Message, Answer, RecordDict]]:
        import torch

        jobs: list[Job] = []
        for message in bundle:
            context, verdict = self._dispatched(message)
            context.state = duplicate(context.state)  # the client may change whatever it gets, as in another process
            jobs.append((self._private(message), context, verdict))
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            answers = answer_all(self._app, jobs, self.bundling.together)
        finally:
            speak_for(self._run.run_id, SERVER_NODE_ID)
            torch.set_num_threads(threads)
        states = [context.state for _, context, _ in jobs]
        return list(zip(bundle, answers, states, strict=True))

    def _private(self, message: Message) -> Message:
        """Return the message that the client sees, with the same array records for all clients of a round."""
        arrays = message.content.array_records
        rest = duplicate(RecordDict({name: record for name, record in message.content.items() if name not in arrays}))
        return make_message(
            copy.copy(message.metadata),
            RecordDict(
                {name: self._shared_arrays(arrays[name]) if name in arrays else rest[name] for name in message.content}
            ),
        )

    def _shared_arrays(self, record: ArrayRecord) -> ArrayRecord:
        return self._shared.get(contents(record), lambda: duplicate_arrays(record))
