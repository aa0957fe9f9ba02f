"""How privacy is put in few words."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from fedpeft.config import RunConfig
from fedpeft.privacy.statement import state
from fedpeft.privacy.words import accountants
from fedpeft.report.privacy import caveats, claim, epsilon, span

Config = Callable[..., RunConfig]


def test_an_epsilon_is_rounded_up_and_a_missing_one_is_a_dash() -> None:
    assert [epsilon(value) for value in (1.2340001, 3.0, None, float("inf"), "x")] == ["1.235", "3.000", "-", "-", "-"]


@pytest.mark.parametrize(
    ("rng", "sampling", "released", "noise"),
    itertools.product(("seeded", "secure"), ("poisson", "shuffle"), (False, True), (0.0, 1.0)),
)
def test_there_is_a_caveat_for_each_reason_that_a_statement_gives(
    config: Config, rng: str, sampling: str, released: bool, noise: float
) -> None:
    chosen = config(
        privacy__level="record",
        privacy__noise_multiplier=noise,
        privacy__rng=rng,
        privacy__sampling=sampling,
        privacy__release_metrics=released,
    )
    facts = state(chosen, {}, {})
    assert len(caveats(chosen.privacy)) == len(facts["reasons"])
    assert ("no guarantee" in claim(facts, chosen.privacy)) == (not facts["guarantee"])


def test_a_spread_of_equal_values_is_one_value() -> None:
    assert span([1.25, 1.25]) == "1.25"
    assert span([3, 1, 2], "d") == "1 to 3"


def test_the_accountant_that_is_named_is_the_one_that_computed() -> None:
    assert accountants({"accountant": "prv", "computed_by": ["prv", "rdp"]}) == "PRV and RDP"
    assert accountants({"accountant": "prv", "computed_by": "gaussian"}) == "the analytic Gaussian"
    assert accountants({"accountant": "rdp", "computed_by": []}) == accountants({"accountant": "rdp"}) == "RDP"
