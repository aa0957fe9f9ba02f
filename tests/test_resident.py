"""Model and rows that a process keeps, and for which runs they are the same."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig
from fedpeft.resident import Resident, ResidentKey, resident

Make = Callable[..., RunConfig]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy__name": "fedit"},
        {"federation__rounds": 7, "federation__fraction": 0.5},
        {"simulation__workers": 3},
        {"run__name": "other", "run__evaluate_every": 2},
    ],
)
def test_how_a_run_goes_changes_neither_model_nor_rows(settings: dict[str, Any], text_config: Make) -> None:
    assert resident(text_config(**settings)) is resident(text_config())


@pytest.mark.parametrize(
    "settings",
    [
        {"run__seed": 5},
        {"adapter__rank": 3},
        {"train__learning_rate": 0.5},
        {"data__max_length": 9},
        {"federation__clients": 2, "partition__scheme": "iid"},
        {"privacy__canaries": 3},
        {"privacy__level": "record", "privacy__noise_multiplier": 1.0},
    ],
)
def test_whatever_they_depend_on_makes_others(settings: dict[str, Any], text_config: Make) -> None:
    first = resident(text_config())
    other = resident(text_config(**settings))
    assert other is not first
    assert other.key == ResidentKey.of(text_config(**settings)) != first.key


def test_runs_of_one_level_share_them_whatever_their_budget(text_config: Make) -> None:
    one = text_config(privacy__level="record", privacy__noise_multiplier=1.0)
    two = text_config(privacy__level="record", privacy__epsilon=3.0, privacy__delta=1e-4)
    assert resident(one) is resident(two)


def test_a_resident_says_nothing_of_any_run(text_config: Make) -> None:
    home = Resident(text_config(strategy__name="fedit", federation__rounds=7, run__name="mine", run__seed=3))
    assert home.config.strategy == RunConfig().strategy
    assert home.config.federation.rounds == RunConfig().federation.rounds
    assert home.config.run.name is None
    assert home.config.run.seed == 3


def test_what_hangs_on_a_resident_is_made_once_and_an_error_is_raised_again(text_config: Make) -> None:
    home, made = Resident(text_config()), []

    def make(of: Resident, name: str) -> list[str]:
        assert of is home
        made.append(name)
        if name == "bad":
            raise ValueError(name)
        return [name]

    assert home.once(make, "a") is home.once(make, "a")
    assert home.once(make, "b") == ["b"]
    assert made == ["a", "b"]
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            home.once(make, "bad")
    assert made == ["a", "b", "bad", "bad"]
    assert Resident(text_config()).once(lambda _: 1) == 1


def test_nobody_reads_of_a_resident_what_it_does_not_depend_on() -> None:
    """``home.config.privacy`` and the like are defaults: what is asked for is in the run's own configuration."""
    for folder in ("fedpeft", "strategies", "clients", "simulations"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("privacy", "strategy", "simulation"):
                    assert not ast.unparse(node.value).endswith("home.config"), f"{path}:{node.lineno}"
