"""Ray's actors at work: each is given one thing at a time, and replaced when it dies."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from flwr.clientapp.client_app import LoadClientAppError
from ray import ObjectRef
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from fedpeft.errors import SimulationError
from fedpeft.simulations.grids.bundles import Bundle
from fedpeft.simulations.grids.scheduling import Died, Finished
from fedpeft.simulations.grids.transport import ParcelledAnswer
from fedpeft.simulations.grids.work import Done, Work

if TYPE_CHECKING:
    from fedpeft.simulations.grids.freight import Freight  # whose imports take seconds, while Ray could start

log = logging.getLogger(__name__)

MAX_DEATHS = 3  # of workers for one message, or of workers that start in a row
PATIENCE = 30.0  # seconds until it is said that workers are slow to start
NODE_DIED = "its node has died"  # as Ray says it of an actor; that says nothing against the others
LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)


class RayPool:
    """Ray actors, each replaced when it dies; a `scheduling.Pool`.

    Parameters
    ----------
    hire : callable
        Make an actor of class `Worker`.
    size : int
        Number of actors.
    send : callable
        Give an actor a bundle of messages; returns Ray's reference to the answers.
    """

    def __init__(self, hire: Callable[[], Any], size: int, send: Callable[[Any, Bundle], ObjectRef]) -> None:
        self._hire = hire
        self._send = send
        self._starting: dict[ObjectRef, Any] = {}
        self._idle: deque[Any] = deque()
        self._busy: dict[ObjectRef, tuple[Any, int]] = {}
        self._failed_starts = 0
        self._patient = True
        self.freight: Freight | None = None  # what actors on other nodes may lack
        self._told: dict[str, Freight] = {}  # by actor, what it was told of
        self._leaving: set[ObjectRef] = set()  # what is answered by actors that are to end then
        self.resize(size)

    def resize(self, size: int, *, renew: bool = False) -> None:
        """Have so many actors from now on; those at work end with what they are at, where they are too many.

        Parameters
        ----------
        size : int
            How many, at least 1.
        renew : bool
            Put new ones in the place of all, because they are hired on other terms now.
        """
        self._size = size
        if renew:
            for worker in (*self._starting.values(), *self._idle):
                ray.kill(worker)
            self._starting.clear()
            self._idle.clear()
            self._leaving |= self._busy.keys()
        while self._staff() < size:
            self._add()
        self._dismiss()

    def _staff(self) -> int:
        """Return how many actors there are, without those that leave."""
        return len(self._starting) + len(self._idle) + len(self._busy.keys() - self._leaving)

    def _dismiss(self) -> None:
        """End actors that are too many and have nothing to do."""
        for _ in range(self._staff() - self._size):
            if self._starting:
                ray.kill(self._starting.popitem()[1])
            elif self._idle:
                ray.kill(self._idle.pop())

    def free(self) -> int:
        """Return how many actors have nothing to do."""
        return len(self._idle)

    def start(self, ticket: int, job: Bundle | Work) -> None:
        """Send messages or other work to an idle actor."""
        worker = self._idle.popleft()
        if self.freight is not None and self._told.get(worker._actor_id.hex()) is not self.freight:
            worker.supply.remote(self.freight)  # what one caller asks of an actor is done in order
            self._told[worker._actor_id.hex()] = self.freight
        if isinstance(job, Work):
            begun = worker.run.remote(job.function, job.job, *job.shared)
        else:
            begun = self._send(worker, job)
        self._busy[begun] = (worker, ticket)

    def wait(self, timeout: float | None) -> list[Finished[list[ParcelledAnswer] | Done] | Died]:
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
                self._leaving.discard(ref)
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
        self.resize(self._size)

    def _settle(self, ref: ObjectRef) -> Finished[list[ParcelledAnswer] | Done] | Died | None:
        if ref in self._starting:
            self._started(ref, self._starting.pop(ref))
            return None
        leaves = ref in self._leaving
        self._leaving.discard(ref)
        worker, ticket = self._busy.pop(ref)
        try:
            result = ray.get(ref)
        except LOST:
            self._replace(worker)
            return Died(ticket)
        if leaves:
            self._replace(worker)
        else:
            self._idle.append(worker)
            self._dismiss()
        return Finished(ticket, result)

    def _started(self, ref: ObjectRef, worker: Any) -> None:
        try:
            trace = ray.get(ref)
        except LOST as error:
            self._failed_starts += NODE_DIED not in str(error)
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
