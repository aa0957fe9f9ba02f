"""Flower's `Grid` over Ray's workers: from one laptop to a cluster of GPUs, with the same results."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ray
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.constant import ErrorCode
from ray import ObjectRef
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from fedpeft.errors import SimulationError
from fedpeft.simulations.grids.base import Answer, SimulationGrid
from fedpeft.simulations.grids.cluster import check_gpus, cpus_per_worker, ray_connection
from fedpeft.simulations.grids.nursery import executable
from fedpeft.simulations.grids.scheduling import Died, Dispatcher, Finished
from fedpeft.simulations.grids.transport import Newest, PackedArrays, Parcel, ParcelledAnswer, contents
from fedpeft.simulations.grids.work import Done, Work
from fedpeft.simulations.grids.worker import Worker, environment

log = logging.getLogger(__name__)

MAX_DEATHS = 3  # of workers for one message, or of workers that start in a row
PATIENCE = 30.0  # seconds until it is said that workers are slow to start
LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)


# not the app, where that is another's: nobody knows what its import does
PRELOADED = (
    *("ray._private.node", "ray._private.workers.default_worker", "fedpeft.simulations.grids.transport"),
    *("fedpeft.clients.app", "fedpeft.strategies.rounds.scoring", "flwr_datasets.partitioner"),
)


def _started_here() -> bool:
    """Tell whether Ray was started on this machine by this process, and for its own workers."""
    node = ray._private.worker._global_node
    return sys.platform == "linux" and node is not None and bool(node.is_head())


class RayPool:
    """Ray actors, each replaced when it dies; a `scheduling.Pool`.

    Parameters
    ----------
    hire : callable
        Make an actor of class `Worker`.
    size : int
        Number of actors.
    wrap : callable
        Make of a message what an actor can be sent.
    """

    def __init__(self, hire: Callable[[], Any], size: int, wrap: Callable[[Message], Parcel]) -> None:
        self._hire = hire
        self._wrap = wrap
        self._starting: dict[ObjectRef, Any] = {}
        self._idle: deque[Any] = deque()
        self._busy: dict[ObjectRef, tuple[Any, int]] = {}
        self._failed_starts = 0
        self._patient = True
        for _ in range(size):
            self._add()

    def free(self) -> int:
        """Return how many actors have nothing to do."""
        return len(self._idle)

    def start(self, ticket: int, job: Message | Work) -> None:
        """Send a message or other work to an idle actor."""
        worker = self._idle.popleft()
        if isinstance(job, Work):
            begun = worker.run.remote(job.function, job.job, *job.shared)
        else:
            begun = worker.answer.remote(self._wrap(job))
        self._busy[begun] = (worker, ticket)

    def wait(self, timeout: float | None) -> list[Finished[ParcelledAnswer | Done] | Died]:
        """Return answers that have come and actors that have died.

        Raises
        ------
        LoadClientAppError
            The app cannot be imported there.
        SimulationError
            New actors die again and again.
        """
        pending = [*self._starting, *self._busy]
        if self._patient and len(self._starting) == len(pending) and (timeout is None or timeout > PATIENCE):
            ready, _ = ray.wait(pending, num_returns=1, timeout=PATIENCE)
            if not ready:
                self._patient = False
                log.warning("still waiting for Ray to start workers; its cluster may be busy")
        else:
            ready, _ = ray.wait(pending, num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        events = [self._settle(ref) for ref in ready]
        return [event for event in events if event is not None]

    def stop(self, ticket: int) -> None:
        """Put a new actor in the place of the one that works on a ticket."""
        for ref, (worker, begun) in list(self._busy.items()):
            if begun == ticket:
                del self._busy[ref]
                self._replace(worker)

    def close(self) -> None:
        """End all actors."""
        for worker in [*self._starting.values(), *self._idle, *(worker for worker, _ in self._busy.values())]:
            ray.kill(worker)

    def _add(self) -> None:
        worker = self._hire()
        self._starting[worker.load.remote()] = worker

    def _replace(self, worker: Any) -> None:
        ray.kill(worker)  # it may be cut off rather than dead
        self._add()

    def _settle(self, ref: ObjectRef) -> Finished[ParcelledAnswer | Done] | Died | None:
        if ref in self._starting:
            self._started(ref, self._starting.pop(ref))
            return None
        worker, ticket = self._busy.pop(ref)
        try:
            result = ray.get(ref)
        except LOST:
            self._replace(worker)
            return Died(ticket)
        self._idle.append(worker)
        return Finished(ticket, result)

    def _started(self, ref: ObjectRef, worker: Any) -> None:
        try:
            trace = ray.get(ref)
        except LOST as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_DEATHS:
                raise SimulationError(
                    f"{MAX_DEATHS} Ray workers in a row died as they started ({type(error).__name__}); "
                    "lower simulation.workers if memory is short, or set simulation.workers = 0 to see what fails"
                ) from None
            self._replace(worker)
            return
        if trace:
            raise LoadClientAppError(f"a worker cannot import the ClientApp:\n{trace}")
        self._failed_starts = 0
        self._patient = False
        self._idle.append(worker)


class RayGrid(SimulationGrid):
    """Flower's `Grid` over Ray actors that keep the ClientApp, and what it caches, from message to message.

    Arrays go to Ray's object store once a round, not once a client. A worker that dies is replaced and its message
    repeated; a ClientApp that raises is not, since it would raise again: that is for the strategy to decide.

    Parameters
    ----------
    app : str
        Where workers import the ClientApp from, as ``module:attribute``.
    contexts : mapping of int to Context
        By node id; see `SimulationGrid`.
    workers : int
        Number of actors, which may exceed the number of cores.
    threads_per_worker : int
        torch threads of each.
    gpus_per_worker : float
        GPUs of each, or a share of one; with 0, workers see none.
    store_bytes : int, optional
        See `ray_connection`.
    verbose : bool
        Let Ray and the workers print.

    Attributes
    ----------
    on_worker_death : callable, optional
        Called with the node id of the client at work and the number of workers its message has cost so far.

    Notes
    -----
    After a timeout, workers that are still at it are replaced, lest a client that hangs holds one for ever.
    """

    def __init__(
        self,
        app: str = "fedpeft.clients.app:app",
        contexts: Mapping[int, Context] | None = None,
        workers: int = 1,
        threads_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        *,
        store_bytes: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(contexts)
        if workers < 1 or threads_per_worker < 1:
            raise ValueError(f"workers = {workers} and threads_per_worker = {threads_per_worker} must be at least 1")
        self.on_worker_death: Callable[[int, int], None] | None = None
        self._app, self._store_bytes, self._verbose = app, store_bytes, verbose
        self._workers, self._threads, self._gpus = workers, threads_per_worker, gpus_per_worker
        self._refs: Newest[ObjectRef] = Newest(4)
        self._dispatcher: Dispatcher[Message | Work, ParcelledAnswer | Done] | None = None
        self._failure: BaseException | None = None
        self._up = threading.Event()
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to start Ray and the workers, and return at once; what fails is raised at first use."""
        if self._leaving.is_set():
            raise RuntimeError("this RayGrid is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._live, name="fedpeft-ray", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End workers, and Ray if it was started here."""
        self._leaving.set()
        if self._thread is not None:
            # nothing can interrupt a Ray that is starting: it ends itself as soon as it is up, or with this process
            if not self._wait_until_up(1.0):
                return
            self._thread.join()
        self._dispatcher = None

    def _live(self) -> None:
        """Hold the connection to Ray, which must end in the thread that began it."""
        try:
            with ray_connection(store_bytes=self._store_bytes, verbose=self._verbose):
                if self._gpus:
                    check_gpus(self._workers, self._gpus)
                variables = environment(self._threads, gpu=self._gpus > 0)
                forked: dict[str, Any] = {}
                if not self._gpus and _started_here():  # a GPU that was looked at is no use to a fork
                    command = executable(PRELOADED, variables)
                    forked = {"runtime_env": {"py_executable": command}}
                actor = ray.remote(Worker).options(
                    num_cpus=cpus_per_worker(self._workers, self._threads),
                    num_gpus=self._gpus,
                    max_restarts=0,
                    scheduling_strategy="SPREAD",
                    **forked,
                )
                pool = RayPool(lambda: actor.remote(self._app, self._threads, variables), self._workers, self._wrap)
                self._dispatcher = Dispatcher(
                    pool,
                    window=2 * self._workers + 2,
                    key=lambda job: object() if isinstance(job, Work) else job.metadata.dst_node_id,
                    max_deaths=MAX_DEATHS,
                    on_death=self._died,
                )
                self._up.set()
                self._leaving.wait()
                pool.close()
        except BaseException as error:
            self._failure = error
        finally:
            if not self._up.is_set():
                self._up.set()

    def _wait_until_up(self, timeout: float | None = None) -> bool:
        """Wait until Ray has started, or failed to; False after `timeout` seconds.

        An interrupt that strikes as `Event.wait` takes its lock leaves it taken for ever, and everybody after hangs.
        Looking again and again takes no lock.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._up.is_set():
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _ready(self) -> Dispatcher[Message | Work, ParcelledAnswer | Done]:
        """Wait until Ray is there."""
        self.start()
        self._wait_until_up()
        if self._failure is not None:
            raise self._failure
        assert self._dispatcher is not None
        return self._dispatcher

    def _exchange(self, messages: Iterator[Message], timeout: float | None) -> Iterator[Message]:
        with contextlib.closing(self._ready().stream(messages, timeout)) as stream:
            for message, packed in stream:
                assert isinstance(message, Message)
                assert not isinstance(packed, Done)
                yield self._deliver(message, *self._unwrap(message, packed))

    def map(self, function: str, jobs: Iterable[Any], *shared: Any) -> Iterator[Any]:
        """Call a function with each job on the workers."""
        dispatcher = self._ready()
        refs = tuple(ray.put(value) for value in shared)
        with contextlib.closing(dispatcher.stream(Work(function, job, refs) for job in jobs)) as stream:
            for _, done in stream:
                if done is None:
                    raise SimulationError(
                        f"{MAX_DEATHS} Ray workers died over one call of {function}; lower simulation.workers or "
                        "run.evaluate_batch_size if memory is short"
                    )
                assert isinstance(done, Done)
                yield done.result()

    def _wrap(self, message: Message) -> Parcel:
        return Parcel.of(message, *self._dispatched(message), self._store)

    def _store(self, record: ArrayRecord) -> ObjectRef:
        """Put arrays into Ray's store, unless they are there."""
        key = contents(record)
        return self._refs.get(key) or self._refs.put(key, ray.put(PackedArrays.of(record)))

    def _unwrap(self, message: Message, packed: ParcelledAnswer | None) -> tuple[Answer, RecordDict | None]:
        if packed is not None:
            return packed.open()
        error = Error(ErrorCode.CLIENT_APP_CRASHED, "WorkerDied")
        return Answer(Message(error, reply_to=message), f"{MAX_DEATHS} workers died over this message"), None

    def _died(self, message: Message | Work, attempt: int) -> None:
        if self.on_worker_death and isinstance(message, Message):
            self.on_worker_death(message.metadata.dst_node_id, attempt)
