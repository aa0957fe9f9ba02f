"""What a dry run finds out of privacy beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedpeft.config import RunConfig
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.mechanism import record_mechanism
from fedpeft.resident import resident
from fedpeft.simulations.plan import plan_privacy
from fedpeft.strategies import with_typed_options

Make = Callable[..., RunConfig]


def planned(make: Make, **settings: Any) -> dict[str, Any]:
    config = with_typed_options(make(privacy__rng="secure", **settings))
    facts = plan_privacy(config, resident(config))
    assert facts is not None
    return facts


def warning_of(facts: dict[str, Any]) -> str:
    (found,) = [warning for warning in facts["warnings"] if warning.startswith("privacy.epsilon")]
    return str(found)


def of_clients(make: Make, **settings: Any) -> dict[str, Any]:
    settings = {"privacy__level": "client", "privacy__noise_multiplier": 0.9, "federation__rounds": 12, **settings}
    return planned(make, strategy__name="fedit", federation__fraction=0.5, **settings)


def of_rows(make: Make, **settings: Any) -> dict[str, Any]:
    settings = {"privacy__level": "record", "privacy__noise_multiplier": 0.9, "federation__rounds": 12, **settings}
    return planned(make, **settings)


def test_a_budget_that_lasts_to_the_end_is_not_warned_of(text_config: Make) -> None:
    assert not any("lasts" in warning for warning in of_clients(text_config, privacy__epsilon=100.0)["warnings"])
    calibrated = of_rows(text_config, privacy__noise_multiplier=None, privacy__epsilon=3.0)
    assert not any("lasts" in warning for warning in calibrated["warnings"])


@pytest.mark.parametrize("lasts", [1, 4, 11])
def test_clients_are_told_for_how_many_rounds_a_budget_lasts(lasts: int, text_config: Make) -> None:
    enough, too_much = (spent([Charge(0.9, 0.5, rounds)], 1e-5).epsilon for rounds in (lasts, lasts + 1))
    facts = of_clients(text_config, privacy__epsilon=(enough + too_much) / 2)
    assert f" lasts for {lasts} of 12 rounds at noise multiplier 0.9: the run ends then" in warning_of(facts)


def test_a_budget_below_one_round_says_so_plainly(text_config: Make) -> None:
    words = "privacy.epsilon = 0.01 does not last for a single round at noise multiplier 0.9"
    assert warning_of(of_clients(text_config, privacy__epsilon=0.01)) == f"{words}: the run ends before its first round"
    skips = warning_of(of_rows(text_config, privacy__epsilon=0.01))
    assert skips == f"{words} (worst client): with privacy.on_exhausted = 'skip' no client ever trains"
    stops = warning_of(of_rows(text_config, privacy__epsilon=0.01, privacy__on_exhausted="stop"))
    assert (
        stops
        == f"{words} (worst client): with privacy.on_exhausted = 'stop' the run ends as soon as such a client is drawn"
    )


def test_of_clients_with_different_rows_the_one_that_spends_most_counts(text_config: Make) -> None:
    config = with_typed_options(text_config(privacy__level="record", privacy__noise_multiplier=0.9))
    counts = [len(rows) for rows in resident(config).partition.indices]
    one_round = [record_mechanism(config, count).charge for count in counts]
    costs = [
        max(spent([replace(charge, steps=charge.steps * at)], 1e-5).epsilon for charge in one_round) for at in (3, 4)
    ]
    found = warning_of(of_rows(text_config, privacy__epsilon=sum(costs) / 2))
    assert " lasts for 3 of 12 rounds at noise multiplier 0.9 (worst client): " in found
    assert found.endswith("with privacy.on_exhausted = 'skip' clients drop out then")
