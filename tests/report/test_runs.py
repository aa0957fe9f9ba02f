from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.report.runs import runs_table
from fedpeft.runs.listing import list_runs
from tests.report.printing import printed

Events = Callable[..., list[dict[str, Any]]]
Config = Callable[..., RunConfig]
Maker = Callable[..., Path]


def test_runs_are_shown_with_method_rounds_state_and_scores(
    run_directory: Maker, config: Config, events: Events
) -> None:
    run = run_directory(config(strategy__name="fedit", data__source="preset:digits"), events(4))
    run_directory(config(federation__rounds=9), events(2, reason="interrupted"), "second")
    run_directory(config(), [], "odd")
    (run_directory(config(), [], "broken") / "config.toml").write_text("[model\n")
    text = printed(runs_table(list_runs(run.parent), run.parent))
    for expected in (
        "first",
        "fedit",
        "digits",
        "4/4",
        "completed",
        "0.2500 -> 0.7500",
        "accuracy",
        "2/9",
        "interrupted",
        "0/4",
        "unreadable",
    ):
        assert expected in text


def test_private_runs_have_a_column_of_what_they_state(run_directory: Maker, config: Config, events: Events) -> None:
    folder = run_directory(config(), events(4)).parent
    assert "epsilon" not in printed(runs_table(list_runs(folder), folder))
    chosen = config(privacy__level="record", privacy__epsilon=3)
    run_directory(chosen, events(4, private=True), "second")
    run_directory(chosen, events(1, private=True, reason=None), "third")  # has stated nothing yet
    (run_directory(config(), [], "broken") / "config.toml").write_text("[model\n")
    found = {facts["name"]: facts for facts in list_runs(folder)}
    assert (found["second"]["level"], found["second"]["epsilon"], found["second"]["guarantee"]) == (
        "record",
        1.8,
        False,
    )
    assert found["third"]["level"] is None
    shown = printed(runs_table(list(found.values()), folder))
    for expected in ("epsilon", "1.800", "no guarantee"):
        assert expected in shown
    found["second"]["guarantee"] = True
    assert "no guarantee" not in printed(runs_table(list(found.values()), folder))


def test_no_runs_yet_says_how_to_make_one() -> None:
    assert "fedpeft simulate" in printed(runs_table([], Path("runs")))
