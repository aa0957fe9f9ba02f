"""Runs that end before their last round, by score or by what was moved, and the best of their adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.runs import read_events
from fedpeft.runs.history import History
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import resume, simulate
from fedpeft.strategies.rounds.ending import EarlyEndError, Patience, is_better

Make = Callable[..., RunConfig]
ADAPTER = "adapter_model.safetensors"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


def test_a_better_score_is_higher_or_lower_as_the_metric_has_it() -> None:
    assert is_better("accuracy", 0.6, 0.5)
    assert not is_better("accuracy", 0.5, 0.5)
    assert is_better("loss", 0.4, 0.5)
    assert not is_better("loss", float("nan"), None)


def test_patience_counts_evaluated_rounds_alone() -> None:
    patience = Patience("loss", 2)
    for number, loss in ((0, 1.0), (3, 0.5), (6, 0.7)):
        patience.scored(number, {"loss": loss}, {})
        patience.round_begins(number + 1)
    patience.scored(9, {"loss": 0.5}, {})
    with pytest.raises(EarlyEndError, match=r"loss has not improved for 2 evaluated rounds \(best 0.5 after round 3\)"):
        patience.round_begins(10)


def test_a_run_that_gets_worse_ends_early_and_its_best_adapter_is_kept(text_config: Make, tmp_path: Path) -> None:
    """Steps far too long: the start is the best, or an early round; the same after a resume."""
    settings = {"train__learning_rate": 0.3, "run__patience": 2, "run__monitor": "loss", "run__best": True}
    outcome = simulate(text_config(federation__rounds=9, **settings), tmp_path / "run")
    run, scores = outcome.path, [event["loss"] for event in events(outcome.path, "evaluate")]
    best = min(range(len(scores)), key=lambda number: scores[number])
    (end,) = events(run, "end")
    assert outcome.is_complete
    assert end["early"]
    assert end["round"] == best + 2 == outcome.rounds < 9
    assert "loss has not improved for 2 evaluated rounds" in end["reason"]
    assert (end["best_round"], end["best_metric"], end["best_score"]) == (best, "loss", scores[best])
    assert History.read(run).state == "completed"
    shorter = simulate(text_config(federation__rounds=max(best, 1), **settings), tmp_path / "shorter").path
    if best:
        same = load_file(shorter / "adapter" / ADAPTER)
        kept = load_file(run / "adapter-best" / ADAPTER)
        assert all((same[name] == kept[name]).all() for name in same)
    resume(shorter, {"federation": {"rounds": 9}})
    for folder in ("adapter", "adapter-best"):
        assert (shorter / folder / ADAPTER).read_bytes() == (run / folder / ADAPTER).read_bytes()
    assert events(shorter, "end")[-1] == end


def test_the_best_adapter_may_be_that_of_the_round_that_is_saved(text_config: Make, tmp_path: Path) -> None:
    run = simulate(text_config(strategy__name="fedit", run__best="loss"), tmp_path / "run").path
    (end,) = events(run, "end")
    assert end["best_round"] == 2  # the last one, of which there is a checkpoint
    assert (run / "adapter-best" / ADAPTER).read_bytes() == (run / "adapter" / ADAPTER).read_bytes()


def test_a_run_ends_before_the_round_that_its_budget_does_not_pay_for(text_config: Make, tmp_path: Path) -> None:
    free = plan(text_config(federation__rounds=1))
    megabytes = 2.5 * free.total_bytes / 1e6
    config = text_config(federation__rounds=5, run__max_megabytes=megabytes, run__evaluate_every=5)
    assert plan(config).to_dict()["affordable_rounds"] == 2
    outcome = simulate(config, tmp_path / "run")
    assert outcome.rounds == 2
    assert sum(event["bytes_up"] + event["bytes_down"] for event in events(outcome.path, "round")) == (
        2 * free.total_bytes
    )
    assert [event["round"] for event in events(outcome.path, "evaluate")] == [0, 2]  # the last one is always scored
    assert "round 3 would go over run.max_megabytes" in events(outcome.path, "end")[0]["reason"]
    assert json.loads((outcome.path / "adapter" / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"run__max_megabytes": 1e-3}, "run.max_megabytes = 0.001 does not pay for one round"),
        ({"run__monitor": "acuracy", "run__patience": 1}, "run.monitor = 'acuracy' .*Did you mean 'accuracy'"),
        ({"run__best": "rouge"}, "run.best = 'rouge' is no metric"),
        ({"run__monitor": "loss"}, "give run.patience or run.best"),
        ({"run__best": True, "strategy__name": "fedsa-lora"}, "run.best: strategy 'fedsa-lora' leaves each client"),
        (
            {"run__patience": 2, "privacy__level": "record", "privacy__noise_multiplier": 1.0},
            "run.patience = 2 is not for privacy.level = 'record'",
        ),
        (
            {"run__max_megabytes": 99.0, "privacy__level": "client", "privacy__noise_multiplier": 1.0},
            "run.max_megabytes = 99 counts messages",
        ),
    ],
)
def test_an_end_that_cannot_be_is_refused_before_anything_is_written(
    settings: dict[str, Any], says: str, text_config: Make, tmp_path: Path
) -> None:
    if settings.get("privacy__level") == "client":
        settings = {**settings, "strategy__name": "fedit"}
    with pytest.raises(ConfigError, match=says) as caught:
        plan(text_config(**settings))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=says):
        simulate(text_config(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
