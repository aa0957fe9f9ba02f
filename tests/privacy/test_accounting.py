"""Our epsilons against Google's accountants, and against integrals and normal tails of many digits."""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from fedpeft.errors import ConfigError, PrivacyError
from fedpeft.privacy import accounting, calibration
from fedpeft.privacy.accounting import Charge, Spent, spent, upper_bound
from fedpeft.privacy.calibration import calibrate

DELTA = 1e-5
GRID = [(sigma, rate) for sigma in (0.6, 1.1, 3.0) for rate in (0.004, 0.064, 0.25)]


@lru_cache
def one_step(sigma: float, rate: float) -> Any:
    return from_gaussian_mechanism(sigma, sampling_prob=rate, value_discretization_interval=2e-4)


def google(*charges: Charge, delta: float = DELTA) -> float:
    """Epsilon by privacy loss distributions: discretised, always upwards."""
    first, *others = (one_step(c.noise_multiplier, c.sample_rate).self_compose(c.steps) for c in charges)
    for other in others:
        first = first.compose(other)
    return float(first.get_epsilon_for_delta(delta))


def close_from_above(ours: float, theirs: float) -> bool:
    return theirs <= ours <= theirs + max(0.01, 0.01 * theirs)


@pytest.mark.parametrize(("sigma", "rate"), GRID)
def test_prv_is_close_to_privacy_loss_distributions_and_never_below(sigma: float, rate: float) -> None:
    for steps in (1, 20, 200, 1000):
        found = spent([Charge(sigma, rate, steps)], DELTA)
        assert found.accountant == "prv"
        assert close_from_above(found.epsilon, google(Charge(sigma, rate, steps))), steps


@pytest.mark.parametrize("delta", [0.1, 1e-3, 1e-8, 1e-10])
def test_prv_holds_for_other_deltas(delta: float) -> None:
    charge = Charge(1.1, 0.064, 300)
    found = spent([charge], delta)
    assert found.accountant == "prv"
    assert close_from_above(found.epsilon, google(charge, delta=delta))


@pytest.mark.parametrize(
    "charges",
    [
        [Charge(1.1, 0.064, 100), Charge(3.0, 0.25, 20)],
        [Charge(1.1, 0.064, 101), Charge(3.0, 0.25, 21), Charge(0.6, 0.004, 7)],
        [Charge(1.1, 0.064, 200), Charge(5.0, 1.0, 20)],
        [Charge(3.0, 1.0, 1), Charge(0.6, 0.004, 1)],
        [
            Charge(0.6, 0.004, 3),
            Charge(10.0, 1.0, 5),
            Charge(3.0, 0.064, 1),
            Charge(3.0, 0.25, 2),
            Charge(1.1, 0.25, 1),
        ],
    ],
)
def test_mixed_histories_are_close_too_with_whole_and_with_sampled_steps(charges: list[Charge]) -> None:
    found = spent(charges, DELTA)
    assert found.accountant == "prv"
    assert close_from_above(found.epsilon, google(*charges))


@pytest.mark.parametrize(("sigma", "rate"), GRID)
def test_rdp_is_that_of_google_with_the_same_orders(sigma: float, rate: float) -> None:
    for steps in (1, 300):
        theirs = RdpAccountant(RDPAccountant.DEFAULT_ALPHAS)
        theirs.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps))
        found = spent([Charge(sigma, rate, steps)], DELTA, "rdp")
        assert found.accountant == "rdp"
        epsilon, order = theirs.get_epsilon_and_optimal_order(DELTA)
        assert found.epsilon <= epsilon * (1 + 1e-9)
        if order > 11:  # below are orders at which Google drops the signs of a series, which is valid and more
            assert found.epsilon == pytest.approx(epsilon, rel=1e-9)


def test_rdp_is_the_divergence_that_integration_finds() -> None:
    for sigma, rate, order in ((1.1, 0.4, 1.1), (3.0, 0.4, 1.2), (1.1, 0.064, 2.5), (0.6, 0.25, 5.0)):
        (found,) = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])
        with mpmath.workdps(30):
            edge = sigma**2 * math.log(1 / rate - 1) + 0.5

            def moment(z: Any, s: float = sigma, q: float = rate, a: float = order) -> Any:
                return mpmath.npdf(z, 0, s) * (1 - q + q * mpmath.exp((2 * z - 1) / (2 * s * s))) ** a

            pieces = sorted([-40 * sigma, -10 * sigma, 0, edge, order, order + 10 * sigma, order + 40 * sigma])
            exact = mpmath.log(mpmath.quad(moment, pieces)) / (order - 1)
        assert found == pytest.approx(float(exact), abs=accounting._RDP_ROUNDING)


def exact_delta(mu: float, epsilon: float) -> Any:
    with mpmath.workdps(50):
        mu, epsilon = mpmath.mpf(mu), mpmath.mpf(epsilon)
        first = mpmath.ncdf(mu / 2 - epsilon / mu)
        return first - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize(
    "charges",
    [
        [Charge(0.05, 1.0, 3)],
        [Charge(0.5, 1.0, 1)],
        [Charge(4.0, 1.0, 50)],
        [Charge(5.0, 1.0, 20), Charge(3.0, 1.0, 4)],
        [Charge(100.0, 1.0, 10)],
    ],
)
def test_without_sampling_epsilon_is_exact_and_rounded_up(charges: list[Charge], delta: float) -> None:
    found = spent(charges, delta)
    assert found.accountant == "gaussian"
    assert spent(charges, delta, "rdp") == found
    mu = math.sqrt(sum(charge.steps / charge.noise_multiplier**2 for charge in charges))
    if found.epsilon == 0:
        assert exact_delta(mu, 0.0) <= delta
        return
    assert exact_delta(mu, found.epsilon) <= delta
    assert exact_delta(mu, found.epsilon * (1 - 1e-7)) > delta


def test_without_sampling_epsilon_is_that_of_privacy_loss_distributions() -> None:
    charges = [Charge(5.0, 1.0, 20), Charge(3.0, 1.0, 4)]
    assert spent(charges, DELTA).epsilon == pytest.approx(google(*charges), rel=1e-5)


def test_no_steps_cost_nothing_and_no_noise_costs_everything() -> None:
    assert spent([], DELTA) == Spent(0.0, "prv")
    assert spent([Charge(1.0, 0.1, 0), Charge(0.0, 0.1, 0)], DELTA, "rdp") == Spent(0.0, "rdp")
    assert upper_bound([], DELTA) == 0.0
    without_noise = [Charge(1.0, 0.1, 5), Charge(0.0, 0.1, 1)]
    assert spent(without_noise, DELTA).epsilon == math.inf
    assert upper_bound(without_noise, DELTA) == math.inf


def test_more_steps_more_rows_and_less_noise_never_cost_less() -> None:
    def costs(*charges: Charge) -> list[float]:
        return [spent([charge], DELTA).epsilon for charge in charges]

    for rising in (
        costs(*(Charge(1.1, 0.064, steps) for steps in (1, 2, 5, 20, 99, 100, 101, 500, 3000, 6000))),
        costs(*(Charge(1.1, rate, 200) for rate in (0.001, 0.01, 0.063, 0.064, 0.3, 0.9, 0.999, 1.0))),
        costs(*(Charge(sigma, 0.064, 200) for sigma in (50.0, 5.0, 1.2, 1.1, 1.099, 0.6, 0.4, 0.2, 0.1))),
    ):
        assert rising == sorted(rising)


def test_the_order_and_the_pieces_of_charges_change_nothing() -> None:
    charges = [Charge(1.1, 0.064, 30), Charge(3.0, 0.25, 20), Charge(0.9, 0.01, 7), Charge(20.0, 1.0, 2)]
    pieces = [Charge(c.noise_multiplier, c.sample_rate, n) for c in charges for n in (c.steps - 1, 1, 0)]
    random.Random(0).shuffle(pieces)
    for accountant in ("prv", "rdp"):
        accounting.spent_by.cache_clear()
        whole = spent(charges, DELTA, accountant)
        accounting.spent_by.cache_clear()
        assert spent(iter(pieces), DELTA, accountant) == whole
    assert upper_bound(pieces, DELTA) == upper_bound(charges, DELTA)


@pytest.mark.parametrize(("sigma", "rate"), [*GRID, (0.2, 0.5), (60.0, 0.01)])
def test_the_upper_bound_is_above_and_not_far(sigma: float, rate: float) -> None:
    for charges in ([Charge(sigma, rate, 300)], [Charge(sigma, rate, 30), Charge(10.0, 1.0, 2)]):
        bound, rdp = upper_bound(charges, DELTA), spent(charges, DELTA, "rdp").epsilon
        assert rdp <= bound <= 1.3 * rdp
        assert spent(charges, DELTA).epsilon <= bound


@pytest.mark.parametrize(
    "charge",
    [
        Charge(0.3, 0.3, 2000),  # losses in the thousands, whose exponential is no float
        Charge(0.02, 0.1, 10),
        Charge(10.0, 0.01, 1_000_000),  # a mesh of millions of points
    ],
)
def test_where_prv_cannot_compute_rdp_does_and_says_so(charge: Charge, recwarn: pytest.WarningsRecorder) -> None:
    found = spent([charge], DELTA)
    assert found == spent([charge], DELTA, "rdp")
    assert found.accountant == "rdp"
    assert math.isfinite(found.epsilon)
    assert not recwarn.list


@pytest.mark.parametrize("failure", [RuntimeError, ValueError, OverflowError, math.nan, math.inf])
def test_where_opacus_fails_rdp_takes_over(failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.accountants.analysis import prv

    def compute_epsilon(*_: object) -> tuple[float, float, float]:
        if isinstance(failure, float):
            return failure, failure, failure
        raise failure("as it may")

    accounting.spent_by.cache_clear()
    monkeypatch.setattr(prv.DiscretePRV, "compute_epsilon", compute_epsilon)
    assert spent([Charge(1.3, 0.05, 11)], DELTA).accountant == "rdp"
    accounting.spent_by.cache_clear()


def next_below(sigma: float) -> float:
    return calibration._noise_multiplier(calibration._index(sigma) - 1)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "accountant", "before"),
    [
        (3.0, 0.064, 200, "prv", []),
        (0.1, 0.064, 200, "prv", []),
        (50.0, 0.3, 60, "prv", []),
        (8.0, 0.01, 1000, "prv", []),
        (1.0, 0.5, 100, "prv", [Charge(20.0, 1.0, 4)]),
        (3.0, 0.01, 500, "prv", [Charge(2.0, 0.064, 100)]),
        (2.0, 1.0, 20, "prv", []),
        (2.0, 1.0, 20, "rdp", [Charge(2.0, 0.064, 20)]),
        (3.0, 0.064, 200, "rdp", []),
    ],
)
def test_calibrated_noise_is_the_least_of_four_digits_that_fits(
    epsilon: float, rate: float, steps: int, accountant: Any, before: list[Charge]
) -> None:
    sigma = calibrate(epsilon, DELTA, rate, steps, accountant, before)
    assert float(f"{sigma:.4g}") == sigma
    found = spent([*before, Charge(sigma, rate, steps)], DELTA, accountant).epsilon
    assert epsilon - max(0.01, 0.01 * epsilon) <= found <= epsilon
    assert spent([*before, Charge(next_below(sigma), rate, steps)], DELTA, accountant).epsilon > epsilon


def test_calibration_takes_few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    compute = accounting._prv_epsilon

    def counted(*given: Any) -> float | None:
        taken.append(given)
        return compute(*given)

    monkeypatch.setattr(accounting, "_prv_epsilon", counted)
    for epsilon in (0.5, 2.9, 7.9):
        taken.clear()
        accounting.spent_by.cache_clear()
        calibration._calibrate.cache_clear()
        first = calibrate(epsilon, DELTA, 0.05, 150)
        assert len(taken) <= 9
        taken.clear()
        assert calibrate(epsilon, DELTA, 0.05, 150) == first
        assert not taken


def test_a_budget_that_needs_no_noise_to_speak_of_gets_the_least() -> None:
    assert calibrate(1e6, DELTA, 1.0, 1) == calibration.LEAST_NOISE


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"spent already.*the budget of 1;"):
        calibrate(1.0, DELTA, 0.064, 10, before=[Charge(0.8, 0.064, 100)])
    with pytest.raises(PrivacyError, match="no noise multiplier up to 10000 keeps 20 steps at sample rate"):
        calibrate(0.05, DELTA, 0.064, 20, "rdp")
    with pytest.raises(PrivacyError, match="spent already"):
        calibrate(1.0, DELTA, 0.064, 10, before=[Charge(0.0, 0.064, 1)])


@pytest.mark.parametrize(
    ("charge", "delta", "accountant", "says"),
    [
        (Charge(-1.0, 0.1, 1), DELTA, "prv", "noise multiplier -1.0"),
        (Charge(math.nan, 0.1, 1), DELTA, "prv", "noise multiplier nan"),
        (Charge(math.inf, 0.1, 1), DELTA, "prv", "noise multiplier inf"),
        (Charge(1.0, 0.0, 1), DELTA, "prv", "sample rate 0.0"),
        (Charge(1.0, 1.1, 1), DELTA, "prv", "sample rate 1.1"),
        (Charge(1.0, 0.1, -1), DELTA, "prv", "steps = -1"),
        (Charge(1.0, 0.1, 1.5), DELTA, "prv", "steps = 1.5"),  # type: ignore[arg-type]
        (Charge(1.0, 0.1, 1), 0.0, "prv", "delta = 0.0"),
        (Charge(1.0, 0.1, 1), 1.0, "prv", "delta = 1.0"),
        (Charge(1.0, 0.1, 1), DELTA, "pvr", "Did you mean 'prv'"),
    ],
)
def test_values_out_of_range_are_named(charge: Charge, delta: float, accountant: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        spent([charge], delta, accountant)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((0.0, DELTA, 0.1, 10), "epsilon = 0.0"),
        ((math.inf, DELTA, 0.1, 10), "epsilon = inf"),
        ((1.0, DELTA, 0.1, 0), "steps = 0"),
        ((1.0, DELTA, 2.0, 10), "sample rate 2.0"),
        ((1.0, 2.0, 0.1, 10), "delta = 2.0"),
    ],
)
def test_calibration_names_values_out_of_range(given: tuple[float, float, float, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        calibrate(*given)
