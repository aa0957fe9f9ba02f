"""What both simulation grids share: message ids, clients' contexts, and how errors are told."""

from __future__ import annotations

import copy
import importlib
import time
import traceback
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.clients.verdicts import Verdict, simulated
from fedpeft.errors import FedpeftError
from fedpeft.simulations.grids.bundles import Bundling, Job, Together

GROUPS = 16  # whose messages are counted: nobody is sent one of a round that is long over
SERVER_NODE_ID = 0  # clients are numbered from 1
FailureListener = Callable[[int, Message, str], None]
# what is decided about one message, see `fedpeft.clients.verdicts`
Dispatch = Callable[[int, Message], Verdict | None]
OWN_CODE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cause:
    """Why a client raised, in its exception's words, or those of its direct cause if it has one.

    Parameters
    ----------
    text : str
        May quote rows.
    quotes_no_row : bool
        That it does not, for certain.
    """

    text: str
    quotes_no_row: bool

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Take the words of an exception."""
        said = error.__cause__ or error
        return cls(str(said), isinstance(said, FedpeftError) and said.quotes_no_row)


@dataclass(frozen=True)
class Answer:
    """What came of a message.

    Parameters
    ----------
    reply : Message
        The client's reply, or one with an error.
    trace : str, optional
        The full traceback, causes included, where the client raised. It stays on this side of the wire.
    place : str, optional
        What of it depends on no row's content: the classes of the errors, and where in fedpeft they were raised.
    cause : Cause, optional
        The same in short.
    seconds : float
        How long the client took; 0 where that is not known.
    """

    reply: Message
    trace: str | None = None
    place: str | None = None
    cause: Cause | None = None
    seconds: float = 0.0


def answer(app: ClientApp, message: Message, context: Context, verdict: Verdict | None = None) -> Answer:
    """Let a ClientApp answer a message in this process, as a client of a simulation.

    An exception becomes an error reply whose reason is the exception's class, or its direct cause's class if it has
    one: the text of an exception may carry a client's data.
    """
    began = time.perf_counter()
    try:
        with simulated(verdict):
            reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned {type(reply).__name__} in place of a Message")
        if reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise ValueError("the ClientApp returned a Message without reply_to=message")
    except (Exception, SystemExit) as error:
        reason = type(error.__cause__ or error).__name__
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        return Answer(reply, "".join(traceback.format_exception(error)), place_of(error), Cause.of(error))
    return Answer(reply, seconds=time.perf_counter() - began)


def answer_all(app: ClientApp, jobs: Sequence[Job], together: str) -> list[Answer]:
    """Let clients answer in this process, together as far as that can be done; see `answer`.

    Parameters
    ----------
    app : ClientApp
        Answers one message.
    jobs : sequence of tuple of Message, Context and Verdict or None
        In the order of the messages.
    together : str
        See `Bundling`.
    """
    contents: Sequence[RecordDict | None] = [None] * len(jobs)
    if together and len(jobs) > 1:
        module, _, attribute = together.partition(":")
        answering: Together = getattr(importlib.import_module(module), attribute)
        contents = answering(jobs)
    answers = []
    for (message, context, verdict), content in zip(jobs, contents, strict=True):
        speak_for(message.metadata.run_id, context.node_id)
        if content is None:
            answers.append(answer(app, message, context, verdict))
        else:
            answers.append(Answer(Message(content, reply_to=message)))
    return answers


def place_of(error: BaseException) -> str:
    """Say of an error and its causes which classes they are, and where in fedpeft's own code they were raised."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    lines = []
    for each in reversed(chain):
        own = [frame for frame in traceback.extract_tb(each.__traceback__) if OWN_CODE in Path(frame.filename).parents]
        places = [f"  {Path(frame.filename).relative_to(OWN_CODE)}:{frame.lineno} in {frame.name}" for frame in own]
        lines += [type(each).__name__, *places]
    return "\n".join(lines) + "\n"


def speak_for(run_id: int, node_id: int) -> None:
    """Say whom this process speaks for: Flower asks this whenever a message is made."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = 0


@runtime_checkable
class KeepsStates(Protocol):
    """Contexts that keep clients' states elsewhere, and make another context at every look."""

    def keep(self, node: int, state: RecordDict) -> None:
        """Take over what a client's next context is to hold."""


class SimulationGrid(Grid):
    """A `Grid` whose clients live on this side of the network.

    Parameters
    ----------
    contexts : mapping of int to Context
        Each client's context by node id, which is its partition id plus one. What a client keeps in ``context.state``
        is stored here, as by `KeepsStates` where these do so, when a reply without error has been handed over; the
        attribute may be set later.

    Attributes
    ----------
    on_failure : callable, optional
        Called with node id, message and traceback (or another explanation) before an error reply is handed over.
    withholds : bool
        Whether it is given `Answer.place` in place of the traceback, which may quote rows.
    on_dispatch : callable, optional
        Called with node id and message EVERY time a client is about to be given it, repeats after a worker's death
        included; returns what the client is told beside it. May raise, and then nobody is given anything.
    causes : dict of int to Cause
        Why each client raised that did so, the last time, by node id.
    bundling : Bundling
        How many messages a worker is given at once; one, unless this is set.
    """

    def __init__(self, contexts: Mapping[int, Context] | None = None) -> None:
        self.contexts: Mapping[int, Context] = contexts or {}
        self.on_failure: FailureListener | None = None
        self.withholds = False
        self.on_dispatch: Dispatch | None = None
        self.causes: dict[int, Cause] = {}
        self.bundling = Bundling()
        self._run = Run.create_empty(1)
        self._sent: dict[str, Counter[tuple[str, int]]] = {}  # by group, which is a round
        self._pushed: dict[str, Message] = {}
        speak_for(self._run.run_id, SERVER_NODE_ID)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End what clients work in, where that is something besides this process."""

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to; number 1 if this is never called."""
        self._run = run
        speak_for(run.run_id, SERVER_NODE_ID)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return Run(**vars(self._run))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as ``Message(...)`` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the clients' node ids, ascending."""
        return sorted(self.contexts)  # linear where they are sorted already

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages for `pull_messages`, and return their ids."""
        ids = []
        for message in messages:
            self._address(message)
            self._pushed[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Have the messages of these ids answered, which takes as long as it takes, and return the replies."""
        pushed = [self._pushed.pop(name) for name in message_ids if name in self._pushed]
        return list(self._exchange(iter(pushed), None))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Have messages answered.

        Between two replies the consumer may call this again, to repeat a client for example; those messages go first.

        Parameters
        ----------
        messages : iterable of Message
            Pulled as they can be worked on, not all at once. One client gets one message at a time.
        timeout : float, optional
            Seconds after which no more is waited for. Messages that are not answered by then have no reply.

        Yields
        ------
        Message
            The replies, in the order of the messages.

        Raises
        ------
        ValueError
            A message for a node id that no client has.
        """
        return self._exchange(map(self._address, messages), timeout)

    @abstractmethod
    def map(self, function: str, jobs: Iterable[Any], *shared: Any) -> Iterator[Any]:
        """Call a function with each job, where the clients work, and yield what it returns in the order of the jobs.

        Parameters
        ----------
        function : str
            As ``module:attribute``. A worker that dies of it is replaced and the job repeated, so it should change
            nothing but what it returns.
        jobs : iterable
            Pulled as they can be worked on. They, and what is returned, are picklable.
        *shared : object
            Passed after the job, and sent once rather than with each.

        Raises
        ------
        FedpeftError
            What the function raised, or that its workers died again and again.
        """

    @abstractmethod
    def _exchange(self, messages: Iterator[Message], timeout: float | None) -> Iterator[Message]:
        """Have messages answered that are addressed already."""

    def _address(self, message: Message) -> Message:
        """Fill in what a SuperLink would; ids are the same in every run, and whatever the number of workers."""
        metadata = message.metadata
        node_id = metadata.dst_node_id
        if node_id not in self.contexts:
            raise ValueError(
                f"no client has node id {node_id}; the {len(self.contexts)} ids are in grid.get_node_ids()"
            )
        kind, group = metadata.message_type, metadata.group_id
        if group not in self._sent and len(self._sent) == GROUPS:
            del self._sent[next(iter(self._sent))]
        sent = self._sent.setdefault(group, Counter())
        number = sent[kind, node_id]
        vars(metadata).update(
            _run_id=self._run.run_id, _src_node_id=SERVER_NODE_ID, _message_id=f"{group}/{kind}/{node_id}/{number}"
        )
        sent[kind, node_id] += 1
        return message

    def _dispatched(self, message: Message) -> tuple[Context, Verdict | None]:
        """Return what a client is given with a message: a context whose state is that which is kept, and a verdict."""
        kept = self.contexts[message.metadata.dst_node_id]
        context = copy.copy(kept)
        verdict = self.on_dispatch(kept.node_id, message) if self.on_dispatch is not None else None
        context.node_config, context.run_config = dict(kept.node_config), dict(kept.run_config)
        return context, verdict

    def _deliver(self, message: Message, answer: Answer, state: RecordDict | None) -> Message:
        """Hand a reply over: keep the client's new state if all went well, tell of the failure if not."""
        reply = answer.reply
        vars(reply.metadata)["_message_id"] = f"{message.metadata.message_id}/reply"
        node_id = message.metadata.dst_node_id
        if reply.has_content():
            if state is not None:
                if isinstance(self.contexts, KeepsStates):
                    self.contexts.keep(node_id, state)
                else:
                    self.contexts[node_id].state = state
            return reply
        if answer.cause is not None:
            self.causes[node_id] = answer.cause
        if self.on_failure:
            explanation = answer.place if self.withholds else answer.trace
            self.on_failure(node_id, message, explanation or reply.error.reason or "")
        return reply
