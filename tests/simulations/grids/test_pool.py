"""The pool of Ray's actors, with actors that are made up: who is hired and dismissed when."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from fedpeft.errors import SimulationError
from fedpeft.simulations.grids.pool import RayPool
from fedpeft.simulations.grids.scheduling import Died, Finished


class Company:
    """Actors, what they are asked, and what has been answered."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.hired: list[int] = []
        self.ended: list[int] = []
        self.told: list[tuple[int, object]] = []
        self.answers: dict[str, object] = {}

    def hire(self) -> Any:
        number = next(self._numbers)
        self.hired.append(number)
        return SimpleNamespace(
            number=number,
            _actor_id=SimpleNamespace(hex=lambda: str(number)),
            load=SimpleNamespace(remote=lambda: f"load {number}"),
            answer=SimpleNamespace(remote=lambda job: f"{job} by {number}"),
            supply=SimpleNamespace(remote=lambda freight: self.told.append((number, freight))),
        )

    def loaded(self, *numbers: int) -> None:
        self.answers |= {f"load {number}": None for number in numbers}

    def wait(self, pending: Sequence[str], num_returns: int, timeout: float | None) -> tuple[list[str], list[str]]:
        return [ref for ref in pending if ref in self.answers], []

    def get(self, ref: str) -> object:
        answer = self.answers.pop(ref)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def there(self) -> set[int]:
        return set(self.hired) - set(self.ended)


@pytest.fixture
def company(monkeypatch: pytest.MonkeyPatch) -> Company:
    company = Company()
    monkeypatch.setattr(ray, "wait", company.wait)
    monkeypatch.setattr(ray, "get", company.get)
    monkeypatch.setattr(ray, "kill", lambda worker: company.ended.append(worker.number))
    return company


def pool_of(company: Company, size: int) -> RayPool:
    return RayPool(company.hire, size, lambda worker, job: worker.answer.remote(job))


def test_a_pool_that_shrinks_ends_those_who_start_then_the_idle_and_the_busy_when_they_are_done(
    company: Company,
) -> None:
    pool = pool_of(company, 4)
    company.loaded(0, 1, 2)
    pool.wait(0)
    pool.start(7, "seven")  # type: ignore[arg-type]
    pool.start(8, "eight")  # type: ignore[arg-type]
    pool.resize(3)
    assert company.ended == [3]
    pool.resize(1)
    assert company.ended == [3, 2]
    assert pool.free() == 0
    company.answers["eight by 1"] = "done"
    assert pool.wait(0) == [Finished(8, "done")]
    assert company.there() == {0}
    company.answers["seven by 0"] = "done"
    assert pool.wait(0) == [Finished(7, "done")]
    assert company.there() == {0}
    assert pool.free() == 1


def test_a_pool_that_grows_hires_and_a_dead_actor_that_was_too_many_is_not_replaced(company: Company) -> None:
    pool = pool_of(company, 1)
    pool.resize(2)
    company.loaded(0, 1)
    pool.wait(0)
    pool.start(7, "seven")  # type: ignore[arg-type]
    pool.start(8, "eight")  # type: ignore[arg-type]
    pool.resize(1)
    company.answers["seven by 0"] = RayActorError()
    assert pool.wait(0) == [Died(7)]
    assert company.there() == {1}
    company.answers["eight by 1"] = RayActorError()
    assert pool.wait(0) == [Died(8)]
    assert company.there() == {2}


def test_actors_on_other_terms_come_as_soon_as_the_old_ones_are_done(company: Company) -> None:
    pool = pool_of(company, 2)
    company.loaded(0, 1)
    pool.wait(0)
    pool.start(7, "seven")  # type: ignore[arg-type]
    pool.resize(3, renew=True)
    assert company.ended == [1]
    assert company.there() == {0, 2, 3, 4}
    company.answers["seven by 0"] = "done"
    assert pool.wait(0) == [Finished(7, "done")]
    assert company.there() == {2, 3, 4}


def test_an_actor_is_told_once_where_model_and_rows_are(company: Company) -> None:
    pool = pool_of(company, 1)
    company.loaded(0)
    pool.wait(0)
    for freight in ("one", "one", "other"):
        pool.freight = freight  # type: ignore[assignment]
        pool.start(7, "seven")  # type: ignore[arg-type]
        company.answers["seven by 0"] = "done"
        pool.wait(0)
    assert company.told == [(0, "one"), (0, "other")]


def test_starts_that_fail_with_their_node_say_nothing_against_the_others(company: Company) -> None:
    pool = pool_of(company, 5)
    gone = "The actor died because its node has died. Node Id: 0"
    company.answers = {f"load {number}": RayActorError(error_msg=gone) for number in range(5)}
    pool.wait(0)
    assert company.there() == {5, 6, 7, 8, 9}
    company.answers = {f"load {number}": RayActorError(error_msg="killed") for number in range(5, 10)}
    with pytest.raises(SimulationError, match="3 Ray workers in a row died"):
        pool.wait(0)
