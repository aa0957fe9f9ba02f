"""Which job goes to which worker when, and in which order the results come out; knows nothing of Ray or Flower.

Results leave in the order of their jobs, whatever order they finish in, so that no sum depends on how many workers
there are. A stream never holds more jobs than its window between pulling one and being asked for what comes after its
result, so that one straggler does not make everything behind it pile up.

Where it is known what jobs will take, a long one is begun before its turn as soon as the stream would end later
otherwise, and no sooner: what is done out of turn has to be held until its turn comes.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Job_contra = TypeVar("Job_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Finished(Generic[Result_co]):
    """A worker has done the job of a ticket."""

    ticket: int
    result: Result_co


@dataclass(frozen=True)
class Died:
    """The worker that had a ticket's job is gone; the pool has put another in its place."""

    ticket: int


class Pool(Protocol[Job_contra, Result_co]):
    """Workers that do one job each at a time."""

    def free(self) -> int:
        """Return how many workers could begin a job now."""

    def start(self, ticket: int, job: Job_contra) -> None:
        """Give the job to a free worker; the ticket is how `wait` and `stop` speak of it."""

    def wait(self, timeout: float | None) -> Iterable[Finished[Result_co] | Died]:
        """Return what has happened, waiting up to `timeout` seconds (None: for ever) for the first thing to happen.

        May return nothing before time is up, such as when a worker has become free.
        """

    def stop(self, ticket: int) -> None:
        """End the ticket's job, whose result nobody waits for any more."""


class _State(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()


@dataclass(eq=False)
class _Entry(Generic[Job, Result]):
    """One job between being pulled and its result being used."""

    ticket: int
    job: Job
    keys: frozenset[Hashable]
    state: _State = _State.WAITING
    result: Result | None = None
    deaths: int = 0
    expected: float = 0.0

    def __lt__(self, other: _Entry[Job, Result]) -> bool:
        """Longer ones come first; of equal ones, the one whose turn it is."""
        return (-self.expected, self.ticket) < (-other.expected, other.ticket)


@dataclass(eq=False)
class _Line(Generic[Job, Result]):
    """The jobs of one stream, in order."""

    source: Iterator[Job]
    entries: deque[_Entry[Job, Result]] = field(default_factory=deque)
    is_pulled: bool = False  # whether all jobs are among the entries
    held: int = 0  # entries that run or are done
    waiting: float = 0.0  # what all entries that wait are expected to take
    longest: list[_Entry[Job, Result]] = field(default_factory=list)  # a heap; holds some that wait no more

    def add(self, entry: _Entry[Job, Result]) -> None:
        """Put a job at the end."""
        self.entries.append(entry)
        self._waits(entry)

    def begins(self, entry: _Entry[Job, Result]) -> None:
        """Note that a job is given to a worker."""
        entry.state = _State.RUNNING
        self.held += 1
        self.waiting -= entry.expected

    def begins_again(self, entry: _Entry[Job, Result]) -> None:
        """Note that a job's worker is gone, and the job is to have another."""
        entry.state = _State.WAITING
        self.held -= 1
        self._waits(entry)

    def used(self) -> None:
        """Drop the first job, whose result was used."""
        self.entries.popleft()
        self.held -= 1

    def _waits(self, entry: _Entry[Job, Result]) -> None:
        self.waiting += entry.expected
        if entry.expected:
            heapq.heappush(self.longest, entry)

    def overdue(self, workers: int) -> _Entry[Job, Result] | None:
        """Return the longest job that waits, if the stream would end later for its waiting any longer.

        That is so when the others will be done before it. What is expected is not what happens, hence it counts twice.
        """
        while self.longest and self.longest[0].state is not _State.WAITING:
            heapq.heappop(self.longest)
        if not self.longest or not self.is_pulled or 2 * self.longest[0].expected * workers < self.waiting:
            return None
        return self.longest[0]


class Dispatcher(Generic[Job, Result]):
    """Feeds a pool from streams of jobs.

    Parameters
    ----------
    pool : Pool
        The workers.
    window : int
        Most jobs of one stream that are begun in their turn but whose results have not been used; as many more may be
        begun before their turn.
    keys : callable, optional
        Jobs of one stream that share a key run one after the other, each begun only when the consumer has come back
        from the result of the one before: what a client keeps must not depend on which of its two messages is faster.
    max_deaths : int
        So many workers may die of one job before it is given up.
    on_death : callable, optional
        Called with the job and how many workers it has cost so far.
    expected : callable, optional
        Gives how long a job will take, in any unit; without it no job is begun before its turn.
    clock : callable
        Seconds that only grow.

    Attributes
    ----------
    window : int
        May be changed as the pool is.
    ahead : int
        So many jobs of a stream are pulled, if that is more than the window, for the sake of those that are long: they
        are begun before their turn once all that are left are known. 0 at first.
    """

    def __init__(
        self,
        pool: Pool[Job, Result],
        *,
        window: int,
        keys: Callable[[Job], frozenset[Hashable]] | None = None,
        max_deaths: int = 3,
        on_death: Callable[[Job, int], None] | None = None,
        expected: Callable[[Job], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if window < 1 or max_deaths < 1:
            raise ValueError(f"window = {window} and max_deaths = {max_deaths} must be at least 1")
        self._pool = pool
        self.window = window
        self._keys = keys
        self._max_deaths = max_deaths
        self._on_death = on_death
        self._expected = expected
        self.ahead = 0
        self._clock = clock
        self._tickets = itertools.count()
        self._lines: list[_Line[Job, Result]] = []
        self._running: dict[int, tuple[_Line[Job, Result], _Entry[Job, Result]]] = {}

    def stream(
        self, jobs: Iterable[Job], timeout: float | None = None
    ) -> Generator[tuple[Job, Result | None], None, None]:
        """Do the jobs, and yield each with its result, in order.

        Another stream may be opened and used while this one is suspended. Its jobs go first; this one's that are pulled
        already keep running.

        Parameters
        ----------
        jobs : iterable
            Pulled as the window allows.
        timeout : float, optional
            Seconds from this call on, after which jobs that are not done are stopped and left out.

        Yields
        ------
        tuple of job and result
            The result is None for a job of which `max_deaths` workers died.
        """
        return self._stream(jobs, None if timeout is None else self._clock() + timeout)

    def _stream(self, jobs: Iterable[Job], deadline: float | None) -> Generator[tuple[Job, Result | None], None, None]:
        line: _Line[Job, Result] = _Line(iter(jobs))
        self._lines.append(line)
        try:
            while self._fill(line, deadline):
                head = line.entries[0]
                # not only where the head is missing: workers that are done must not idle while the consumer works
                self._collect(0.0)
                while head.state is not _State.DONE:
                    if self._late(deadline):
                        self._abandon(line, stop=True)
                        yield from [(entry.job, entry.result) for entry in line.entries]
                        return
                    self._collect(None if deadline is None else max(0.0, deadline - self._clock()))
                yield head.job, head.result
                line.used()
        finally:
            self._abandon(line, stop=False)
            self._lines.remove(line)

    def _late(self, deadline: float | None) -> bool:
        return deadline is not None and self._clock() >= deadline

    def _fill(self, line: _Line[Job, Result], deadline: float | None) -> bool:
        """Pull jobs as far as may be; return whether the stream has any left."""
        self._start_waiting()
        while len(line.entries) < max(self.window, self.ahead) and not line.is_pulled and not self._late(deadline):
            try:
                job = next(line.source)
            except StopIteration:
                line.is_pulled = True
                break
            entry = _Entry[Job, Result](next(self._tickets), job, self._keys(job) if self._keys else frozenset())
            entry.expected = 0.0 if self._expected is None else self._expected(job)
            line.add(entry)
            self._start_waiting()
        self._start_waiting()
        return bool(line.entries)

    def _start_waiting(self) -> None:
        """Give every free worker a job, of the innermost stream that has one."""
        free = self._pool.free()
        for line in reversed(self._lines):
            while free:
                entry = self._next(line, len(self._running) + free)
                if entry is None:
                    break
                line.begins(entry)
                self._running[entry.ticket] = line, entry
                self._pool.start(entry.ticket, entry.job)
                free -= 1

    def _next(self, line: _Line[Job, Result], workers: int) -> _Entry[Job, Result] | None:
        """Return the job of a stream that a free worker should have."""
        long = line.overdue(workers) if line.held < 2 * self.window else None
        if long is not None and all(
            long.keys.isdisjoint(other.keys)
            for other in itertools.takewhile(lambda other: other is not long, line.entries)
        ):
            return long
        taken: set[Hashable] = set()
        for entry in itertools.islice(line.entries, self.window):
            if entry.state is _State.WAITING and taken.isdisjoint(entry.keys):
                return entry
            taken.update(entry.keys)
        return None

    def _collect(self, timeout: float | None) -> None:
        """Take in what happens within `timeout` seconds, of whichever stream."""
        for event in self._pool.wait(timeout):
            line, entry = self._running.pop(event.ticket, (None, None))
            if line is None or entry is None:  # abandoned meanwhile
                continue
            if isinstance(event, Finished):
                entry.state, entry.result = _State.DONE, event.result
                continue
            entry.deaths += 1
            if entry.deaths == self._max_deaths:
                entry.state = _State.DONE
            else:
                line.begins_again(entry)
            if self._on_death:
                self._on_death(entry.job, entry.deaths)
        self._start_waiting()

    def _abandon(self, line: _Line[Job, Result], *, stop: bool) -> None:
        """Leave only what is done in the line; what runs is stopped, or its result ignored when it comes."""
        for entry in line.entries:
            if entry.state is _State.RUNNING:
                del self._running[entry.ticket]
                if stop:
                    self._pool.stop(entry.ticket)
        line.entries = deque(entry for entry in line.entries if entry.state is _State.DONE)
        line.longest.clear()
