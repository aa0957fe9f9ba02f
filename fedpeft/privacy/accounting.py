"""What a sequence of subsampled Gaussian mechanisms costs.

Every figure is an upper bound: for Poisson sampling, for data sets that differ in one unit added or removed, and for
randomness that stays secret. Three accountants give it:

- ``prv``: numerical composition of privacy random variables, Gopi et al. 2021, https://arxiv.org/abs/2106.02848, with
  the parts of Opacus. Their error in epsilon is absolute; here it is chosen by the size of the result.
- ``rdp``: Renyi differential privacy, Mironov et al. 2019, https://arxiv.org/abs/1908.10530, by Opacus. Looser, and it
  takes over where ``prv`` cannot: too many steps, or an epsilon in the hundreds.
- ``gaussian``: where every unit takes part in every step the mechanisms are one Gaussian mechanism, whose cost is known
  exactly: Balle and Wang 2018, https://arxiv.org/abs/1805.06530. It stands in for either of the two.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.special import log_ndtr

from fedpeft.config.privacy import Accountant
from fedpeft.errors import ConfigError, nearest

# prv: its error in epsilon, absolute and relative to RDP's epsilon, which is a few times too large at worst
_ERROR, _RELATIVE_ERROR, _LARGEST_ERROR = 0.002, 0.001, 0.5
_USUAL_POINTS, _MOST_POINTS = 2**19, 2**21  # prv: points of the mesh; two million take two seconds and some 300 MB
_WIDEST = 4  # prv: how many times its error may grow to stay with the usual number of points
_LARGEST_LOSS = 690.0  # prv: exp of a privacy loss must stay a float
_NO_NOISE = 1e-6  # noise multipliers below cost more than can be computed
_NO_FRACTIONS = 2.0  # upper bounds: with that much noise orders that are no whole number hardly help, and take seconds
_RDP_ROUNDING = 1e-11  # upper bounds: what Opacus's series may be off, each step


@dataclass(frozen=True)
class Charge:
    """So many steps of one Poisson-subsampled Gaussian mechanism.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the sensitivity.
    sample_rate : float
        Chance of each unit to take part in a step, in (0, 1].
    steps : int
        How many.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True)
class Spent:
    """What charges cost together.

    Parameters
    ----------
    epsilon : float
        At the delta asked for; infinity where there is no noise.
    accountant : str
        What computed it: ``prv``, ``rdp``, or ``gaussian`` (analytic, where every unit takes part in every step).
    """

    epsilon: float
    accountant: str


Charges = tuple[Charge, ...]


# --- what was spent ----------------------------------------------------------------------------------------------


def spent(charges: Iterable[Charge], delta: float, accountant: Accountant = "prv") -> Spent:
    """Return what charges cost together: an epsilon that is never below the true one.

    Parameters
    ----------
    charges : iterable of Charge
        In any order; equal mechanisms may come in pieces.
    delta : float
        Of the guarantee, in (0, 1).
    accountant : {"prv", "rdp"}
        Where ``prv`` cannot compute it, ``rdp`` does, and the result says so.

    Returns
    -------
    Spent
        Within 1 % or 0.01 of the true epsilon, whichever is larger, if ``prv`` or ``gaussian`` computed it.

    Raises
    ------
    ConfigError
        A value is out of range, or there is no such accountant.
    """
    return spent_by(merged(charges), checked_delta(delta), checked_accountant(accountant))


@lru_cache(maxsize=4096)
def spent_by(charges: Charges, delta: float, accountant: Accountant) -> Spent:
    """Return what checked and `merged` charges cost; see `spent`."""
    if not charges:
        return Spent(0.0, accountant)
    if any(charge.noise_multiplier < _NO_NOISE for charge in charges):
        return Spent(math.inf, accountant)
    if all(charge.sample_rate == 1 for charge in charges):
        return Spent(gaussian_epsilon(_gaussian_mu(charges), delta), "gaussian")
    if accountant == "prv":
        epsilon = _prv_epsilon(charges, delta)
        if epsilon is not None:
            return Spent(epsilon, "prv")
    return Spent(_rdp_epsilon(charges, delta), "rdp")


def upper_bound(charges: Iterable[Charge], delta: float) -> float:
    """Return an epsilon that the charges do not exceed, fast enough for progress displays.

    Parameters
    ----------
    charges : iterable of Charge
        In any order.
    delta : float
        Of the guarantee, in (0, 1).

    Returns
    -------
    float
        By Renyi differential privacy over some of the orders of ``rdp``, so never below `spent` with it. A mechanism's
        first use takes up to a tenth of a second, others microseconds.

    Raises
    ------
    ConfigError
        A value is out of range.
    """
    return _renyi_bound(merged(charges), checked_delta(delta))


# --- the accountants ---------------------------------------------------------------------------------------------


def _prv_epsilon(charges: Charges, delta: float) -> float | None:
    """Compose privacy random variables; None where that fails, or would be too large to try.

    The truncation of the losses only has to be wide enough. So it comes from the cached bound of a few orders:
    computing all orders of Opacus for it takes longer than all the rest.
    """
    from opacus.accountants.analysis import prv

    steps = [charge.steps for charge in charges]
    delta_error = delta / 1000
    reach = max(
        _renyi_bound(charges, delta_error / 4),
        *(_renyi_bound((_one_step(charge),), delta_error / (8 * sum(steps))) for charge in charges),
    )
    half_width = reach + 3  # as Opacus and the authors' own code have it
    scale = math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)  # the error in meshes
    relative = _renyi_bound(charges, delta)
    least = max(_ERROR, min(_RELATIVE_ERROR * relative, _LARGEST_ERROR))
    most = max(_WIDEST * _ERROR, min(_WIDEST * _RELATIVE_ERROR * relative, _LARGEST_ERROR))
    error = min(max(least, 2 * half_width * scale / _USUAL_POINTS), most)
    # an even number of points that Fourier transforms are fast for: zero is the last of the lower half
    half = math.ceil(half_width * scale / error) + 1
    if half > _MOST_POINTS / 2:
        return None
    half = next_fast_len(half, real=True)
    mesh = error / scale
    if half * mesh > _LARGEST_LOSS:
        return None
    # numpy's and scipy's complaints are of limits, such as log(1 - q) for q = 1, and of what the checks below find
    with _silence(), contextlib.suppress(RuntimeError, ValueError, ArithmeticError):
        domain = prv.Domain(-(half - 1) * mesh, half * mesh, 2 * half)
        variables = [prv.PoissonSubsampledGaussianPRV(each.sample_rate, each.noise_multiplier) for each in charges]
        truncated = [prv.TruncatedPrivacyRandomVariable(each, domain.t_min, domain.t_max) for each in variables]
        composed = prv.compose_heterogeneous([prv.discretize(each, domain) for each in truncated], steps)
        # probabilities below zero are what the Fourier transforms are off, and as much again is off upwards
        noise = -2 * float(composed.pmf[composed.pmf < 0].sum())
        if noise < delta / 10:
            _, _, epsilon = composed.compute_epsilon(delta - noise, delta_error, error)
            if math.isfinite(epsilon):
                return max(0.0, float(epsilon))
    return None


def _rdp_epsilon(charges: Charges, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(charge.noise_multiplier, charge.sample_rate, charge.steps) for charge in charges]
    with _silence():
        return max(0.0, float(accountant.get_epsilon(delta)))


def _renyi_bound(charges: Charges, delta: float) -> float:
    if not charges:
        return 0.0
    if any(charge.noise_multiplier < _NO_NOISE for charge in charges):
        return math.inf
    orders = _renyi_orders()
    divergences = np.zeros(orders.shape)
    for charge in charges:
        divergences += charge.steps * _renyi_divergences(charge.noise_multiplier, charge.sample_rate)
    # Balle et al. 2020, theorem 21, https://arxiv.org/abs/1905.09982
    bounds = divergences - (math.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    return max(0.0, float(bounds.min()))


def _renyi_orders() -> NDArray[np.float64]:  # (orders,)
    """Return some of Opacus's orders: where the best one lies between two of these, the bound hardly moves."""
    return np.array([1.2, 1.5, 2, 2.5, *range(3, 11), *range(12, 17), 18, 20, 24, 28, 32, 40, 48, 63])


@lru_cache(maxsize=4096)
def _renyi_divergences(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:  # (orders,)
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = _renyi_orders()
    if noise_multiplier >= _NO_FRACTIONS:
        orders = np.ceil(orders)  # the divergence grows with its order: the next whole one bounds it
    distinct, places = np.unique(orders, return_inverse=True)
    with _silence():
        divergences = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=distinct.tolist())
    bounded: NDArray[np.float64] = np.maximum(divergences, 0)[places] + _RDP_ROUNDING
    return bounded


def _gaussian_mu(charges: Iterable[Charge]) -> float:
    """Return the distance, in standard deviations, of the two Gaussians that steps without sampling compose to."""
    return math.hypot(*(math.sqrt(charge.steps) / charge.noise_multiplier for charge in charges))


def _gaussian_log_delta(mu: float, epsilon: float) -> float:
    """Return the logarithm of Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu)."""
    first, second = (float(log_ndtr(sign * mu / 2 - epsilon / mu)) for sign in (1, -1))
    ratio = epsilon + second - first
    return first + math.log(-math.expm1(ratio)) if ratio < 0 else -math.inf


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of two Gaussians `mu` standard deviations apart, rounded up."""
    if not math.isfinite(mu):
        return math.inf
    target = math.log(delta) - 1e-9  # less than delta by what rounding can make of it
    if _gaussian_log_delta(mu, 0.0) <= target:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu
    while _gaussian_log_delta(mu, high) > target:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_log_delta(mu, middle) > target else (low, middle)
    return high


# --- input -------------------------------------------------------------------------------------------------------


def merged(charges: Iterable[Charge]) -> Charges:
    """Check charges, join equal mechanisms, drop what has no steps, and put the rest into one order."""
    steps: dict[tuple[float, float], int] = defaultdict(int)
    for charge in charges:
        if not (math.isfinite(charge.noise_multiplier) and charge.noise_multiplier >= 0):
            raise ConfigError(f"noise multiplier {charge.noise_multiplier} is not allowed; give a number of 0 or more.")
        if not 0 < charge.sample_rate <= 1:
            raise ConfigError(
                f"sample rate {charge.sample_rate} is not allowed; give a number above 0 and up to 1, such as "
                "batch size / rows."
            )
        if not (charge.steps >= 0 and charge.steps == int(charge.steps)):
            raise ConfigError(f"steps = {charge.steps} is not allowed; give a whole number of 0 or more.")
        if charge.steps:
            steps[float(charge.noise_multiplier), float(charge.sample_rate)] += int(charge.steps)
    return tuple(Charge(*mechanism, count) for mechanism, count in sorted(steps.items()))


def _one_step(charge: Charge) -> Charge:
    return Charge(charge.noise_multiplier, charge.sample_rate, 1)


def checked_delta(delta: float) -> float:
    """Return a delta that makes sense, or raise ConfigError."""
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta} is not allowed; give a number between 0 and 1, below 1 / units protected.")
    return float(delta)


def checked_accountant(accountant: str) -> Accountant:
    """Return an accountant that exists, or raise ConfigError."""
    for known in get_args(Accountant):
        if accountant == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"there is no accountant '{accountant}'. {nearest(accountant, get_args(Accountant))}")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
