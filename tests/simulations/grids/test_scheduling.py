from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.simulations.grids.scheduling import Died, Dispatcher, Finished


class FakePool:
    """Workers whose time is the number of calls to wait; who finishes next, and who dies, is chosen from outside."""

    def __init__(
        self, workers: int, pick: Callable[[list[int]], int] = min, dies: Callable[[object], bool] | None = None
    ):
        self.workers = workers
        self.pick = pick
        self.dies = dies or (lambda job: False)
        self.running: dict[int, object] = {}
        self.started: list[object] = []
        self.stopped: list[object] = []
        self.most_running = 0
        self.held: set[object] = set()  # jobs that never finish
        self.eager = False  # whether things happen while nobody waits

    def free(self) -> int:
        return self.workers - len(self.running)

    def start(self, ticket: int, job: object) -> None:
        assert self.free() > 0
        self.running[ticket] = job
        self.started.append(job)
        self.most_running = max(self.most_running, len(self.running))

    def wait(self, timeout: float | None) -> list[Finished[str] | Died]:
        able = [ticket for ticket, job in self.running.items() if job not in self.held]
        if timeout == 0.0 and not self.eager:
            return []
        if not able:
            assert timeout is not None, "waits for ever"
            return []
        ticket = self.pick(able)
        job = self.running.pop(ticket)
        return [Died(ticket) if self.dies(job) else Finished(ticket, f"result of {job}")]

    def stop(self, ticket: int) -> None:
        self.stopped.append(self.running.pop(ticket))


def results(jobs: list[int]) -> list[tuple[int, str]]:
    return [(job, f"result of {job}") for job in jobs]


@given(st.integers(0, 30), st.integers(1, 5), st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
def test_results_leave_in_the_order_of_jobs_whatever_order_they_finish_in(
    count: int, workers: int, window: int, eager: bool, chance: random.Random
) -> None:
    pool = FakePool(workers, chance.choice)
    pool.eager = eager
    dispatcher = Dispatcher[int, str](pool, window=window)
    assert list(dispatcher.stream(range(count))) == results(list(range(count)))
    assert sorted(pool.started) == list(range(count))  # type: ignore[type-var]
    assert pool.most_running == min(workers, window, count)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 12), st.randoms(use_true_random=False))
def test_no_more_jobs_are_pulled_than_the_window_holds(
    count: int, workers: int, window: int, chance: random.Random
) -> None:
    pulled = 0

    def jobs() -> Iterator[int]:
        nonlocal pulled
        for job in range(count):
            pulled += 1
            yield job

    stream = Dispatcher[int, str](FakePool(workers, chance.choice), window=window).stream(jobs())
    assert pulled == 0
    for used, _ in enumerate(stream):
        assert pulled == min(count, used + window)


@given(
    st.dictionaries(st.integers(0, 11), st.integers(1, 5), max_size=6),
    st.integers(1, 4),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_a_job_whose_worker_dies_is_done_again_until_its_limit(
    deaths: dict[int, int], workers: int, window: int, chance: random.Random
) -> None:
    left = Counter(deaths)
    told: list[tuple[int, int]] = []

    def dies(job: object) -> bool:
        assert isinstance(job, int)
        left[job] -= 1
        return left[job] >= 0

    dispatcher = Dispatcher[int, str](
        FakePool(workers, chance.choice, dies),
        window=window,
        max_deaths=3,
        on_death=lambda job, attempt: told.append((job, attempt)),
    )
    expected = [(job, None if deaths.get(job, 0) >= 3 else f"result of {job}") for job in range(12)]
    assert list(dispatcher.stream(range(12))) == expected
    assert sorted(told) == [(job, n) for job in sorted(deaths) for n in range(1, min(deaths[job], 3) + 1)]


@given(
    st.sets(st.integers(0, 14)),
    st.integers(1, 4),
    st.integers(1, 8),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_stream_opened_between_two_results_of_another_gets_its_own_and_takes_none(
    repeated: set[int], workers: int, window: int, eager: bool, chance: random.Random
) -> None:
    pool = FakePool(workers, chance.choice)
    pool.eager = eager
    dispatcher = Dispatcher[int, str](pool, window=window)
    outer = []
    for job, result in dispatcher.stream(range(15)):
        outer.append((job, result))
        if job in repeated:
            again = [100 + job, 200 + job]
            assert list(dispatcher.stream(again)) == results(again)
    assert outer == results(list(range(15)))


def test_the_jobs_of_an_inner_stream_go_first() -> None:
    pool = FakePool(workers=1)
    dispatcher = Dispatcher[int, str](pool, window=4)
    outer = dispatcher.stream(range(4))
    next(outer)
    assert list(dispatcher.stream([77, 78])) == results([77, 78])
    assert list(outer) == results([1, 2, 3])
    assert pool.started == [0, 1, 77, 78, 2, 3]


def test_a_stream_may_be_opened_while_another_pulls_its_jobs() -> None:
    dispatcher = Dispatcher[int, str](FakePool(workers=2), window=3)

    def jobs() -> Iterator[int]:
        for job in range(4):
            assert list(dispatcher.stream([10 + job])) == results([10 + job])
            yield job

    assert list(dispatcher.stream(jobs())) == results([0, 1, 2, 3])


def test_workers_get_new_jobs_while_results_that_came_early_are_used() -> None:
    pool = FakePool(workers=2, pick=max)  # everything behind the first job is done before it
    pool.eager = True
    stream = Dispatcher[int, str](pool, window=8).stream(range(30))
    next(stream)
    for _ in range(10):
        begun = len(pool.started)
        next(stream)
        assert len(pool.started) > begun


@given(st.integers(1, 4), st.randoms(use_true_random=False))
def test_jobs_with_equal_keys_run_one_after_the_other(workers: int, chance: random.Random) -> None:
    pool = FakePool(workers, chance.choice)
    dispatcher = Dispatcher[str, str](pool, window=6, keys=lambda job: job[:1])
    used: list[object] = []
    jobs = ["a1", "a2", "b1", "a3", "b2", "c1"]
    for job, _ in dispatcher.stream(jobs):
        for started in pool.started:
            earlier = [other for other in jobs[: jobs.index(str(started))] if other[0] == str(started)[0]]
            assert set(earlier) <= set(used), "begun before the one before it was used"
        used.append(job)
    assert used == jobs


def test_what_is_not_done_in_time_has_no_result_and_is_stopped() -> None:
    now = [0.0]

    class SlowPool(FakePool):
        def wait(self, timeout: float | None) -> list[Finished[str] | Died]:
            events = super().wait(timeout)
            now[0] += 1.0 if events else (timeout or 0.0)
            return events

    pool = SlowPool(workers=3)
    pool.held = {1, 4}
    stream = Dispatcher[int, str](pool, window=5, clock=lambda: now[0]).stream(range(99), timeout=10.0)
    assert list(stream) == results([0, 2, 3, 5])
    assert now == [10.0]
    assert pool.stopped == [1, 4]
    assert not pool.running


def test_when_the_consumer_takes_all_the_time_only_what_is_done_by_then_follows() -> None:
    now = [0.0]
    pool = FakePool(workers=2, pick=max)
    pool.held = {3}
    pulled = []

    def jobs() -> Iterator[int]:
        for job in range(99):
            pulled.append(job)
            yield job

    stream = Dispatcher[int, str](pool, window=4, clock=lambda: now[0]).stream(jobs(), timeout=10.0)
    used = [next(stream)]
    now[0] = 11.0
    used += stream
    assert used == results([0, 1, 2])
    assert (pulled, pool.stopped) == ([0, 1, 2, 3], [3])


def test_a_stream_that_is_closed_early_leaves_the_pool_to_others() -> None:
    pool = FakePool(workers=2)
    dispatcher = Dispatcher[int, str](pool, window=4)
    stream = dispatcher.stream(range(9))
    assert next(stream) == (0, "result of 0")
    stream.close()
    assert list(dispatcher.stream([50, 51, 52])) == results([50, 51, 52])
    assert pool.started == [0, 1, 2, 50, 51, 52]
    assert pool.stopped == []


def test_an_error_of_the_source_reaches_the_consumer_and_leaves_the_pool_to_others() -> None:
    dispatcher = Dispatcher[int, str](FakePool(workers=2), window=2)

    def jobs() -> Iterator[int]:
        yield 0
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(dispatcher.stream(jobs()))
    assert list(dispatcher.stream([1])) == results([1])


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": 1, "max_deaths": 0}])
def test_a_window_or_limit_below_one_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Dispatcher[int, str](FakePool(workers=1), **wrong)  # type: ignore[arg-type]


# --- jobs of which it is known how long they take ---------------------------------------------------------------------


class ClockedPool:
    """Workers on a simulated clock: a job is a number of seconds, of which the first is a name."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.now = 0.0
        self.running: dict[int, float] = {}  # when each is done
        self.started: list[object] = []

    def free(self) -> int:
        return self.workers - len(self.running)

    def start(self, ticket: int, job: tuple[int, float]) -> None:
        self.running[ticket] = self.now + job[1]
        self.started.append(job[0])

    def wait(self, timeout: float | None) -> list[Finished[str] | Died]:
        if timeout == 0.0:
            return []
        ticket = min(self.running, key=lambda each: (self.running[each], each))
        self.now = self.running.pop(ticket)
        return [Finished(ticket, "done")]

    def stop(self, ticket: int) -> None:
        del self.running[ticket]


def makespan(seconds: list[float], workers: int, expected: Callable[[tuple[int, float]], float] | None) -> float:
    """Return when the last of these jobs is done, and check what holds for every stream."""
    pool = ClockedPool(workers)
    window = 2 * workers + 2
    used = 0
    dispatcher = Dispatcher[tuple[int, float], str](pool, window=window, expected=expected)
    dispatcher.ahead = 100
    for job, _ in dispatcher.stream(enumerate(seconds)):
        assert job[0] == used
        used += 1
        assert len(pool.started) - used < 2 * window, "more results are held than may be"
    assert used == len(seconds)
    return pool.now


def test_a_long_job_at_the_end_is_begun_before_its_turn() -> None:
    seconds = [1.0] * 20 + [10.0]
    assert makespan(seconds, 2, None) == 20.0
    assert makespan(seconds, 2, lambda job: job[1]) == 15.0  # of 30 on two workers


def test_jobs_that_take_the_same_are_begun_in_their_turn() -> None:
    pool = ClockedPool(2)
    list(Dispatcher[tuple[int, float], str](pool, window=6, expected=lambda job: 1.0).stream(enumerate([1.0] * 40)))
    assert pool.started == list(range(40))


@given(
    st.lists(st.floats(0.1, 1.0).map(lambda u: u**-1.5), min_size=1, max_size=60),
    st.integers(1, 5),
    st.floats(1.0, 1.5),
)
def test_no_round_is_much_longer_than_it_must_be_and_results_stay_in_order(
    seconds: list[float], workers: int, wrong: float
) -> None:
    least = max(sum(seconds) / workers, max(seconds))
    guessed = makespan(seconds, workers, lambda job: job[1] * (wrong if job[0] % 2 else 1.0))
    assert guessed <= 2 * least  # as of whatever order in which no worker is idle (Graham, 1966)


def test_on_the_average_rounds_of_unequal_clients_end_sooner() -> None:
    chance = random.Random(3)
    rounds = [[chance.lognormvariate(0, 1.2) for _ in range(16)] for _ in range(60)]
    least = sum(max(sum(seconds) / 2, *seconds) for seconds in rounds)
    in_turn = sum(makespan(seconds, 2, None) for seconds in rounds)
    known = sum(makespan(seconds, 2, lambda job: job[1]) for seconds in rounds)
    assert in_turn > 1.15 * least
    assert known < 1.03 * least


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 12), st.integers(1, 20), st.randoms(use_true_random=False))
def test_what_is_expected_changes_no_result_whoever_dies(
    count: int, workers: int, window: int, ahead: int, chance: random.Random
) -> None:
    left = Counter({job: chance.randint(0, 2) for job in range(count)})

    def dies(job: object) -> bool:
        assert isinstance(job, int)
        left[job] -= 1
        return left[job] >= 0

    dispatcher = Dispatcher[int, str](
        FakePool(workers, chance.choice, dies),
        window=window,
        keys=lambda job: frozenset({job % 7}),
        expected=lambda job: chance.random(),
    )
    dispatcher.ahead = ahead
    assert list(dispatcher.stream(range(count))) == results(list(range(count)))
