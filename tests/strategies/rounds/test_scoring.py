from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest

from fedpeft.config import RunConfig
from fedpeft.resident import resident
from fedpeft.strategies.rounds import scoring
from fedpeft.strategies.rounds.scoring import Part, Scoring, score_part
from fedpeft.training.evaluation import mean_metrics, score
from fedpeft.wire import to_record

Make = Callable[..., RunConfig]


class Elsewhere:
    """Calls functions as workers do: what comes and goes is pickled, and shared arrays cannot be written to."""

    def __init__(self) -> None:
        self.jobs: list[Part] = []

    def __call__(self, function: str, jobs: Iterable[Part], shared: Mapping[str, Any]) -> Iterator[Any]:
        assert function == "fedpeft.strategies.rounds.scoring:score_part"
        shared = pickle.loads(pickle.dumps(shared))
        for array in shared.values():
            array.flags.writeable = False
        self.jobs = pickle.loads(pickle.dumps(list(jobs)))
        yield from pickle.loads(pickle.dumps([score_part(job, shared) for job in self.jobs]))


@pytest.mark.parametrize(("most", "parts"), [(64, 4), (2, 2), (1, 1)])
def test_the_test_rows_are_scored_in_parts_with_the_scores_of_one_pass(
    most: int, parts: int, text_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MOST_PARTS", most)
    config = text_config(run__evaluate_batch_size=7)
    home, workers = resident(config), Elsewhere()
    assert len(home.test) == 24  # three batches of seven and one of three
    arrays = to_record(home.adapted.initial)
    expected = score(home.adapted.model, home.test, config).metrics()
    found = Scoring(config, home, [], None, workers)(0, arrays)
    assert found is not None
    assert found[0] == expected
    assert len(workers.jobs) == parts
    # every batch once, that of the longest rows first
    assert sorted(batch for job in workers.jobs for batch in range(job.first, job.last)) == [0, 1, 2, 3]
    assert workers.jobs[0].last == 4
    assert Scoring(config, home, [], None)(0, arrays) == found  # in this process


def test_of_clients_with_tensors_of_their_own_each_is_scored_by_one_job(text_config: Make) -> None:
    config = text_config(strategy__name="fedsa-lora", run__evaluate_batch_size=7)
    home, workers = resident(config), Elsewhere()
    initial = home.adapted.initial
    names = [name for name in initial if "lora_B" in name]
    own = {client: {name: initial[name] + shift for name in names} for client, shift in (("a", 0.1), ("b", -0.2))}
    found = Scoring(config, home, names, lambda: own, workers).score(initial)
    expected = []
    for tensors in own.values():
        home.adapted.load({**initial, **tensors}, home.adapted.scaling)
        expected.append(score(home.adapted.model, home.test, config).metrics())
    assert found[0] == mean_metrics(expected)
    assert expected[0] != expected[1]
    assert [(job.first, job.last, sorted(job.own)) for job in workers.jobs] == [(0, 4, sorted(names))] * 2


def test_rounds_in_which_nothing_is_due_ask_no_worker(text_config: Make) -> None:
    config = text_config(run__evaluate_every=2, federation__rounds=5)
    home, workers = resident(config), Elsewhere()
    scores = Scoring(config, home, [], None, workers)
    due = [scores(number, to_record(home.adapted.initial)) is not None for number in range(6)]
    assert due == [True, False, True, False, True, True]
