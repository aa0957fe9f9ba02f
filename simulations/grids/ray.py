"""Flower's `Grid` over Ray's workers: from one laptop to a cluster of GPUs, with the same results."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from ray import ObjectRef

from fedpeft.deferred import needed
from fedpeft.errors import SimulationError
from fedpeft.simulations.grids.base import Answer, SimulationGrid
from fedpeft.simulations.grids.bundles import Bundle, nodes_of
from fedpeft.simulations.grids.cluster import (
    OWN,
    Fixed,
    Node,
    Sizer,
    Sizing,
    alive,
    check_gpus,
    cpus_per_worker,
    named_address,
    nodes,
    own_folder,
    ray_connection,
    this_node,
)
from fedpeft.simulations.grids.nursery import PRELOADED, executable
from fedpeft.simulations.grids.pace import Pace
from fedpeft.simulations.grids.pool import MAX_DEATHS, RayPool
from fedpeft.simulations.grids.scheduling import Dispatcher
from fedpeft.simulations.grids.transport import Newest, PackedArrays, Parcel, ParcelledAnswer, contents, settle
from fedpeft.simulations.grids.work import Done, Work
from fedpeft.simulations.grids.worker import Worker, environment

if TYPE_CHECKING:
    from fedpeft.simulations.grids.freight import Freight  # whose imports take seconds, while Ray could start

log = logging.getLogger(__name__)

AHEAD = 256  # messages that are pulled for the sake of long ones, where it is known which are
LOOK_SECONDS = 2.0  # between two looks at which nodes there are


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
    workers : int or Sizer
        Number of actors, which may exceed the number of cores, or who decides about it and about their GPUs: he is
        asked again when workers have shown what they need, and when a node comes or goes.
    threads_per_worker : int
        torch threads of each.
    gpus_per_worker : float
        GPUs of each, or a share of one; with 0, workers see none.
    address : str, optional
        See `ray_connection`.
    store_bytes : int, optional
        See `ray_connection`.
    verbose : bool
        Let Ray and the workers print.

    Attributes
    ----------
    pace : Pace
        What messages are expected to take; its `work` may be set.
    freight : callable, optional
        Returns what workers on other nodes than this process's may lack; asked where there are such nodes.
    most : int, optional
        Clients that are at work at a time, at most; more workers are not needed.
    on_worker_death : callable, optional
        Called with the node id of the client at work, of a bundle the first one's, and the number of workers that its
        message has cost so far.

    Notes
    -----
    After a timeout, workers that are still at it are replaced, lest a client that hangs holds one for ever.
    """

    def __init__(
        self,
        app: str = "fedpeft.clients.app:app",
        contexts: Mapping[int, Context] | None = None,
        workers: int | Sizer = 1,
        threads_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        *,
        address: str | None = None,
        store_bytes: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(contexts)
        if isinstance(workers, int):
            if workers < 1 or threads_per_worker < 1:
                raise ValueError(
                    f"workers = {workers} and threads_per_worker = {threads_per_worker} must be at least 1"
                )
            workers = Fixed(workers, gpus_per_worker)
        self.most: int | None = None
        self.freight: Callable[[], Freight] | None = None
        self.on_worker_death: Callable[[int, int], None] | None = None
        self._app, self._store_bytes, self._verbose = app, store_bytes, verbose
        self.pace = Pace()
        self._sizer, self._threads, self._cluster = workers, threads_per_worker, address
        self._nodes: list[Node] = []
        self._sizing: Sizing | None = None
        self._looked = 0.0
        self._served: tuple[object, frozenset[str]] | None = None
        self._refs: Newest[ObjectRef] = Newest(4)
        self._pool: RayPool | None = None
        self._dispatcher: Dispatcher[Bundle | Work, list[ParcelledAnswer] | Done] | None = None
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

    @property
    def sizing(self) -> Sizing:
        """How many workers there are; waits for a cluster, which has to be asked, but not for a Ray that is starting.

        Raises
        ------
        FedpeftError
            Ray cannot be started or connected to.
        """
        self.start()
        while not self._nodes and not self._up.is_set():
            time.sleep(0.01)
        if not self._nodes:
            self._ready()
        return self._sizer.fit(self._nodes, self.most)

    def _live(self) -> None:
        """Hold the connection to Ray, which must end in the thread that began it."""
        try:
            if named_address(self._cluster)[1] == OWN and not ray.is_initialized():
                self._nodes = [this_node()]
            with ray_connection(address=self._cluster, store_bytes=self._store_bytes, verbose=self._verbose):
                # a node that is this machine keeps what it had before Ray started
                self._nodes = [replace(node, name=name) for node in self._nodes for name in alive()] or nodes()
                self._looked = time.monotonic()
                self._sizing = sizing = self._sizer.fit(self._nodes, self.most)
                if sizing.gpus_per_worker:
                    check_gpus(sizing.workers, sizing.gpus_per_worker)
                self._pool = RayPool(self._hire, sizing.workers, self._send)
                self._dispatcher = Dispatcher(
                    self._pool,
                    window=_window(sizing.workers),
                    keys=lambda job: frozenset() if isinstance(job, Work) else nodes_of(job),
                    max_deaths=MAX_DEATHS,
                    on_death=self._died,
                    expected=self._expected,
                )
                self._up.set()
                self._leaving.wait()
                self._pool.close()
        except BaseException as error:
            self._failure = error
        finally:
            if not self._up.is_set():
                self._up.set()

    def _hire(self) -> Any:
        """Start an actor."""
        assert self._sizing is not None
        workers, gpus = self._sizing.workers, self._sizing.gpus_per_worker
        is_cluster = named_address(self._cluster)[1] != OWN
        variables = environment(self._threads, gpu=gpus > 0)
        forked: dict[str, Any] = {}
        folder = own_folder() if sys.platform == "linux" else None
        if folder and not gpus:  # a GPU that was looked at is no use to a fork
            command = executable(folder, (*needed(), *PRELOADED), variables)
            forked = {"runtime_env": {"py_executable": command}}
        actor = ray.remote(Worker).options(
            num_cpus=cpus_per_worker(workers, self._threads, gpus, grows=is_cluster),
            num_gpus=gpus,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            **forked,
        )
        return actor.remote(self._app, self._threads, variables)

    def _tend(self) -> None:
        """Have as many workers as should be by what is known now, and have ready what they may lack."""
        assert self._sizing is not None
        assert self._pool is not None
        assert self._dispatcher is not None
        self._look()
        self._serve(self._pool)
        before, now = self._sizing, self._sizer.fit(self._nodes, self.most)
        self._sizing = now
        if (now.workers, now.gpus_per_worker) != (before.workers, before.gpus_per_worker):
            log.info("%d workers become %s", before.workers, now)
            self._pool.resize(now.workers, renew=now.gpus_per_worker != before.gpus_per_worker)
            self._dispatcher.window = _window(now.workers)

    def _serve(self, pool: RayPool) -> None:
        """Have ready what nodes lack, where there are others than this process's."""
        others = frozenset(node.name for node in self._nodes if not node.drives)
        if self._served == (self.freight, others):
            return
        known = pool.freight if self._served is not None and self._served[0] == self.freight else None
        self._served = self.freight, others
        if self.freight is None or not others:
            pool.freight = known
            return
        pool.freight = (known or self.freight()).with_stored(others)

    def _look(self) -> None:
        """Use nodes that have come, and no longer count on those that have gone."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if alive() != {node.name for node in self._nodes}:
            self._nodes = nodes(self._nodes)

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

    def _ready(self) -> Dispatcher[Bundle | Work, list[ParcelledAnswer] | Done]:
        """Wait until Ray is there."""
        self.start()
        self._wait_until_up()
        if self._failure is not None:
            raise self._failure
        assert self._dispatcher is not None
        self._tend()
        return self._dispatcher

    def _exchange(self, messages: Iterator[Message], timeout: float | None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        dispatcher = self._ready()
        dispatcher.ahead = 0 if self.pace.work is None else AHEAD
        # a client that hangs until time is up would take with it what others of its bundle have answered
        by_pace = self.bundling.size == 1 and timeout is None
        workers = 1 if self._sizing is None else self._sizing.workers
        bundles = self.pace.bundles(messages, workers) if by_pace else self.bundling.bundles(messages)
        with contextlib.closing(dispatcher.stream(bundles, timeout)) as stream:
            yield from _settled(self._replies(stream, deadline))

    def _replies(
        self, stream: Iterable[tuple[Bundle | Work, list[ParcelledAnswer] | Done | None]], deadline: float | None
    ) -> Iterator[Message]:
        for bundle, packed in stream:
            assert not isinstance(bundle, Work)
            assert not isinstance(packed, Done)
            if packed is None and len(bundle) > 1:  # each by itself: one of them may be what kills workers
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                yield from self._one_by_one(bundle, left)
                continue
            for index, message in enumerate(bundle):
                yield self._received(message, None if packed is None else packed[index])

    def _received(self, message: Message, packed: ParcelledAnswer | None) -> Message:
        answer, state = self._unwrap(message, packed)
        if packed is not None:
            self._sizer.learn(packed.footprint)
            self._tend()
        if packed is not None and answer.seconds:
            self.pace.learn(message, answer.seconds, packed.num_bytes)
        return self._deliver(message, answer, state)

    def _one_by_one(self, bundle: Bundle, timeout: float | None) -> Iterator[Message]:
        with contextlib.closing(self._ready().stream([(message,) for message in bundle], timeout)) as stream:
            yield from self._replies(stream, None)

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

    def _send(self, worker: Any, bundle: Bundle) -> ObjectRef:
        parcels = [Parcel.of(message, *self._dispatched(message), self._store) for message in bundle]
        return worker.answer.remote(parcels, self.bundling.together)

    def _expected(self, job: Bundle | Work) -> float:
        return 0.0 if isinstance(job, Work) else sum(map(self.pace.expected, job))

    def _store(self, record: ArrayRecord) -> ObjectRef:
        """Put arrays into Ray's store, unless they are there."""
        key = contents(record)
        return self._refs.get(key) or self._refs.put(key, ray.put(PackedArrays.of(record)))

    def _unwrap(self, message: Message, packed: ParcelledAnswer | None) -> tuple[Answer, RecordDict | None]:
        if packed is not None:
            return packed.open()
        error = Error(ErrorCode.CLIENT_APP_CRASHED, "WorkerDied")
        return Answer(Message(error, reply_to=message), f"{MAX_DEATHS} workers died over this message"), None

    def _died(self, job: Bundle | Work, attempt: int) -> None:
        if self.on_worker_death and not isinstance(job, Work):
            self.on_worker_death(job[0].metadata.dst_node_id, attempt)


def _window(workers: int) -> int:
    """Return how many messages are pulled ahead of the one whose reply is used."""
    return 2 * workers + 2


def _settled(replies: Iterator[Message]) -> Iterator[Message]:
    """Yield replies, and give those that somebody keeps arrays of their own: Ray's store is not made for them all.

    Whoever folds replies as they come has dropped one when it comes back from the next.
    """
    recent: deque[weakref.ref[Message]] = deque()
    while handed := list(itertools.islice(replies, 1)):
        recent.append(weakref.ref(handed[0]))
        yield handed.pop()
        if len(recent) > 1:
            _settle(recent.popleft())
    for reference in recent:
        _settle(reference)


def _settle(reference: weakref.ref[Message]) -> None:
    message = reference()
    if message is not None and message.has_content():
        settle(message.content)
