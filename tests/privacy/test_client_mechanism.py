"""What a round that protects clients costs, and how a configuration names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.client_mechanism import AdaptiveClipping, ClientPrivacy, client_privacy

Make = Callable[..., RunConfig]


EVEN = {"partition__scheme": "iid", "federation__clients": 4}  # 24 rows each


@given(
    st.floats(0.05, 20),
    st.floats(1.01, 50),
    st.sampled_from(["poisson", "fixed"]),
    st.floats(0.1, 1e4),
    st.booleans(),
)
def test_count_and_sum_together_cost_one_gaussian_step(
    z: float, factor: float, cohort: Any, expected: float, given_noise: bool
) -> None:
    privacy = ClientPrivacy(
        z, cohort=cohort, adaptive=AdaptiveClipping(count_noise=factor * z / 2 if given_noise else None)
    )
    z_delta, sigma_b = privacy.update_noise(expected), privacy.count_noise(expected)
    assert 1 / z_delta**2 + 1 / (2 * sigma_b) ** 2 == pytest.approx(1 / z**2)
    assert privacy.charge(0.1).noise_multiplier == z


def test_without_adaptive_clipping_nothing_is_spent_on_a_count() -> None:
    assert ClientPrivacy(1.3).update_noise(10.0) == 1.3
    assert ClientPrivacy(0.0, adaptive=AdaptiveClipping()).update_noise(10.0) == 0.0


def test_a_count_that_would_spend_the_whole_round_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"clip_count_noise = 0\.5.*above 0\.5"):
        ClientPrivacy(1.0, adaptive=AdaptiveClipping(count_noise=0.5))
    ClientPrivacy(1.0, adaptive=AdaptiveClipping(count_noise=0.51))


def private(make: Make, **settings: Any) -> RunConfig:
    return make(**{**EVEN, "privacy__level": "client", "privacy__noise_multiplier": 0.0, **settings})


def test_the_configuration_names_the_mechanism(text_config: Make) -> None:
    config = private(
        text_config,
        privacy__noise_multiplier=1.5,
        privacy__max_update_norm=0.2,
        privacy__cohort="fixed",
        privacy__rng="seeded",
        privacy__adaptive_clipping=True,
        privacy__clip_quantile=0.7,
        privacy__clip_count_noise=4.0,
    )
    made = client_privacy(config)
    assert made == ClientPrivacy(1.5, 0.2, "fixed", "seeded", AdaptiveClipping(0.7, 0.2, 4.0))
    assert made.sample_rate(0.1) == 1.0
    unsaid = client_privacy(private(text_config, privacy__noise_multiplier=1.5))
    assert unsaid == ClientPrivacy(1.5, 1.0, "poisson", "secure")
    assert unsaid.charge(0.1).sample_rate == 0.1


@pytest.mark.parametrize(("cohort", "rate"), [("poisson", 0.1), ("fixed", 1.0)])
def test_noise_is_calibrated_to_the_budget_over_all_rounds_and_repeats(
    cohort: Any, rate: float, text_config: Make
) -> None:
    config = private(
        text_config,
        privacy__noise_multiplier=None,
        privacy__epsilon=4.0,
        privacy__cohort=cohort,
        privacy__spare_rounds=5,
        federation__rounds=20,
        federation__fraction=0.1,
    )
    made = client_privacy(config)
    assert 3.9 < spent([Charge(made.noise_multiplier, rate, 25)], 1e-5).epsilon <= 4.0
    assert replace(made.charge(0.1), steps=25) == Charge(made.noise_multiplier, rate, 25)
