"""What runs inside a Ray worker.

The settings of OpenMP and others count only if they stand before torch is loaded, and Ray imports this module before it
makes a `Worker`; so the top of this file imports nothing that imports it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft.deferred import defer, need

if TYPE_CHECKING:
    from flwr.app import ArrayRecord
    from flwr.clientapp import ClientApp
    from ray import ObjectRef

    from fedpeft.simulations.grids.freight import Freight
    from fedpeft.simulations.grids.transport import Parcel, ParcelledAnswer, SharedRecords
    from fedpeft.simulations.grids.work import Done


def environment(threads: int, *, gpu: bool) -> dict[str, str]:
    """Return the environment variables of a worker with so many threads."""
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # threads that wait for work must not take cores from other workers
        "OMP_WAIT_POLICY": "PASSIVE",
        # every thread's own arena keeps what it has freed; a worker's many threads mostly wait
        "MALLOC_ARENA_MAX": "2",
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # jemalloc makes a thread as soon as it is loaded, and keeps more
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return variables if gpu else {**variables, "CUDA_VISIBLE_DEVICES": ""}


def load_app(name: str) -> ClientApp:
    """Import a ClientApp by a name of the form ``module:attribute``."""
    from flwr.clientapp import ClientApp

    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ValueError(f"'{name}' is not of the form module:attribute, such as fedpeft.clients.app:app")
    app = getattr(importlib.import_module(module), attribute)
    if not isinstance(app, ClientApp):
        raise TypeError(f"'{name}' is of type {type(app).__name__}, not a ClientApp")
    return app


class Worker:
    """Answers messages for whichever clients they are sent to.

    Parameters
    ----------
    app : str
        The ClientApp, as ``module:attribute``: imported here, since what it caches must stay from message to message.
    threads : int
        torch threads.
    variables : mapping of str to str
        Environment variables.
    """

    def __init__(self, app: str, threads: int, variables: Mapping[str, str]) -> None:
        os.environ.update(variables)
        if app.partition(".")[0] == __name__.partition(".")[0]:  # that of others may import what it likes
            defer()
        else:
            need()
        self._name = app
        self._threads = threads
        self._loaded: tuple[ClientApp, SharedRecords] | None = None  # what stays from message to message

    def load(self) -> str | None:
        """Import torch and the app; return the traceback if that fails."""
        import torch

        torch.set_num_threads(self._threads)
        with contextlib.suppress(RuntimeError):  # something has used them already
            torch.set_num_interop_threads(1)
        try:
            from fedpeft.simulations.grids.transport import SharedRecords

            self._loaded = load_app(self._name), SharedRecords()
        except Exception:
            return traceback.format_exc()
        return None

    def supply(self, freight: Freight) -> None:
        """Be told where model and rows are that this node may lack; they are fetched when they are needed."""
        freight.announce()

    def run(self, function: str, job: Any, *shared: Any) -> Done:
        """Call a function of a module, see `fedpeft.simulations.grids.base.SimulationGrid.map`."""
        from fedpeft.simulations.grids.work import do

        return do(function, job, *shared)

    def answer(self, parcels: Sequence[Parcel], together: str = "") -> list[ParcelledAnswer]:
        """Have the app answer messages; several are answered together, see `fedpeft.simulations.grids.bundles`."""
        from fedpeft.simulations.grids.base import answer_all
        from fedpeft.simulations.grids.transport import ParcelledAnswer

        assert self._loaded is not None, "load comes first"
        app, shared = self._loaded

        def fetch(ref: ObjectRef) -> ArrayRecord:
            """Return the arrays behind a reference: for the same one the same object, so that they are decoded once."""
            import ray

            return shared.get(ref.hex(), lambda: ray.get(ref).unpack())

        answers = []
        # those that only travel together are opened one by one: a client may change what it is given
        for group in [parcels] if together else [[parcel] for parcel in parcels]:
            jobs = [(*parcel.open(fetch), parcel.verdict) for parcel in group]
            for each, (_, context, _) in zip(answer_all(app, jobs, together), jobs, strict=True):
                answers.append(ParcelledAnswer.of(each, context.state))
        return answers
