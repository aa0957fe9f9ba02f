from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import RunDirectoryError
from fedpeft.runs.history import History, domain_scores, worst

Events = Callable[..., list[dict[str, Any]]]


def test_totals_are_sums_over_rounds(events: Events) -> None:
    history = History.from_events(events(3))
    assert (history.done, history.bytes_up, history.bytes_down) == (3, 4_500_000, 6_000_000)
    assert history.seconds == 24.75
    assert [history.bytes_until(at) for at in range(4)] == [0, 3_500_000, 7_000_000, 10_500_000]


@pytest.mark.parametrize(
    ("reason", "state"),
    [("completed", "completed"), ("interrupted", "interrupted"), ("round 3: nobody", "stopped"), (None, "running")],
)
def test_the_last_event_says_how_a_run_ended(events: Events, reason: str | None, state: str) -> None:
    assert History.from_events(events(2, reason=reason)).state == state


def test_faults_and_good_rounds_are_counted_by_client(events: Events) -> None:
    history = History.from_events(events(4, faults={2: ("1", "no reply")}))
    assert (history.clients["1"].rounds, history.clients["1"].faults) == (3, 1)
    assert (history.clients["0"].rounds, history.clients["0"].faults) == (4, 0)
    assert history.clients["0"].loss == 1.5 / 4


def test_scores_of_clients_are_kept_of_the_first_and_the_latest_evaluation_only(events: Events) -> None:
    history = History.from_events(events(4, by_client=True))
    assert [scores["0"]["accuracy"] for scores in history.client_scores] == [0.25, 0.75]
    assert all("scores" not in event["clients"] for event in history.evaluations.values())


def test_events_of_other_programs_are_passed_over(events: Events) -> None:
    foreign: list[object] = [7, None, "x", [], {}, {"event": "round"}, {"event": "round", "round": "one"}]
    foreign.append({"event": "evaluate", "round": 9, "split": "train", "accuracy": 1.0})
    assert History.from_events([*foreign, *events(2)]) == History.from_events(events(2))


@pytest.mark.parametrize(("metric", "name"), [("accuracy", "b"), ("perplexity", "a"), ("loss", "a")])
def test_the_worst_domain_has_the_lowest_accuracy_or_the_highest_perplexity(metric: str, name: str) -> None:
    event = {"domains": {"a": {metric: 0.9}, "b": {metric: 0.5}, "broken": {metric: None}}}
    assert domain_scores(event, metric) == {"a": 0.9, "b": 0.5}
    assert worst(domain_scores(event, metric), metric) == name


def test_a_half_written_last_line_is_left_out(events: Events, run_directory: Any, config: Any) -> None:
    run: Path = run_directory(config(), events(2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "rou')
    assert History.read(run) == History.from_events(events(2))


def test_metrics_that_are_no_text_are_a_user_error(run_directory: Any, config: Any) -> None:
    run: Path = run_directory(config(), [])
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl"):
        History.read(run)


def test_epsilon_is_the_bound_of_the_last_round_until_it_is_stated(events: Events) -> None:
    going = History.from_events(events(3, private=True, reason=None))
    assert (going.is_private, going.epsilon, going.privacy) == (True, 1.5, None)
    done = History.from_events(events(3, private=True))
    assert done.privacy is not None
    assert done.epsilon == done.privacy["epsilon_max"] == 0.45 * 3
    plain = History.from_events(events(3))
    assert (plain.is_private, plain.epsilon) == (False, None)
