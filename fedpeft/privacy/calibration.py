"""How much noise a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from fedpeft.config.privacy import Accountant
from fedpeft.errors import ConfigError, PrivacyError
from fedpeft.privacy.accounting import (
    Charge,
    Charges,
    checked_accountant,
    checked_delta,
    gaussian_epsilon,
    merged,
    spent_by,
)
from fedpeft.rounding import as_given, upwards

LEAST_NOISE, MOST_NOISE = 1e-2, 1e4  # noise multipliers between which `calibrate` looks

_LEAST_MANTISSA = 1000  # of a calibrated noise multiplier, which has four significant digits


def calibrate(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "prv",
    before: Sequence[Charge] = (),
) -> float:
    """Return the least noise multiplier with which so many more steps stay within a budget.

    Parameters
    ----------
    epsilon : float
        The budget, over `before` and the steps to come.
    delta : float
        Of the guarantee, in (0, 1).
    sample_rate : float
        Chance of each unit to take part in a step, in (0, 1].
    steps : int
        How many are to come, at least 1.
    accountant : {"prv", "rdp"}
        As for `spent`.
    before : sequence of Charge
        What was spent already.

    Returns
    -------
    float
        With four significant digits, so that it prints and reads back as itself, and rounded up: `spent` is at most
        epsilon. At least 0.01.

    Raises
    ------
    ConfigError
        A value is out of range, or there is no such accountant.
    PrivacyError
        `before` alone exceeds the budget, or no noise multiplier up to 10 000 is enough.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"epsilon = {epsilon} is no budget; give a positive number, such as 3.")
    if not steps >= 1:
        raise ConfigError(f"steps = {steps} is too few to calibrate noise for; give a whole number of 1 or more.")
    (planned,) = merged([Charge(1.0, sample_rate, steps)])
    return _calibrate(
        float(epsilon),
        checked_delta(delta),
        planned.sample_rate,
        planned.steps,
        checked_accountant(accountant),
        merged(before),
    )


@lru_cache(maxsize=1024)
def _calibrate(
    epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant, before: Charges
) -> float:
    already = spent_by(before, delta, accountant).epsilon
    if already > epsilon:
        raise PrivacyError(
            f"epsilon {upwards(already)} is spent already at delta {delta:g}, more than the budget of "
            f"{as_given(epsilon)}; give a larger budget, or stop."
        )

    def cost(index: int) -> float:
        planned = Charge(_noise_multiplier(index), sample_rate, steps)
        return spent_by(merged([*before, planned]), delta, accountant).epsilon

    least, most = _index(LEAST_NOISE), _index(MOST_NOISE)
    # low costs too much and high does not: walk from a guess until both are known, then close in on the first that fits
    costs: dict[int, float] = {}
    low, high, stride, turns = least - 1, most + 1, 100, 0
    index = min(max(_index(_guess(epsilon, delta, sample_rate, steps, before)), least), most)
    while high - low > 1:
        costs[index] = cost(index)
        low, high = (index, high) if costs[index] > epsilon else (low, index)
        if low == most:
            more, of_which = (" more", f", of which {upwards(already)} is spent") if before else ("", "")
            raise PrivacyError(
                f"no noise multiplier up to {MOST_NOISE:g} keeps {steps}{more} steps at sample rate {sample_rate:g} "
                f"within epsilon {as_given(epsilon)} at delta {delta:g}{of_which}; "
                "give a larger budget, fewer steps, or a smaller sample rate."
            )
        if low in costs and high in costs:
            turns += 1
            index = _between(low, high, costs[low], costs[high], epsilon, turns)
        else:
            index = min(low + stride, most) if low in costs else max(high - stride, least)
            stride *= 6
    return _noise_multiplier(high)


def _between(low: int, high: int, above: float, below: float, epsilon: float, turns: int) -> int:
    """Interpolate in logarithms, where the cost is almost a straight line, and halve at every fourth turn."""
    if turns % 4 == 0 or not (math.isfinite(above) and below > 0):
        return (low + high) // 2
    share = (math.log(above) - math.log(epsilon)) / (math.log(above) - math.log(below))
    first, last = math.log(_noise_multiplier(low)), math.log(_noise_multiplier(high))
    index = _index(math.exp(first + share * (last - first)))
    # the line passes a root on the same side each time: a step beyond makes it the other side's turn
    index += (1 if share < 0.5 else -1) * (turns > 1)
    return min(max(index, low + 1), high - 1)


def _guess(epsilon: float, delta: float, sample_rate: float, steps: int, before: Charges) -> float:
    """Guess a noise multiplier by the central limit theorem.

    Many steps are nearly one Gaussian mechanism with mu^2 = q^2 steps (exp(1 / sigma^2) - 1): Bu et al. 2020,
    https://arxiv.org/abs/1911.11607. That promises too much, so it is where a search starts, and nothing else.
    """
    low, high = 0.0, math.sqrt(2 * epsilon) + 10.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_epsilon(middle, delta) <= epsilon else (low, middle)
    used = sum(_central_limit(charge) for charge in before)
    left = max(low * low - used, 1e-3 * low * low)
    if sample_rate == 1:
        return math.sqrt(steps / left)
    return 1 / math.sqrt(math.log1p(left / (sample_rate * sample_rate * steps)))


def _central_limit(charge: Charge) -> float:
    precision = charge.noise_multiplier**-2
    growth = precision if charge.sample_rate == 1 else math.expm1(min(precision, 700.0))
    return charge.sample_rate**2 * charge.steps * growth


def _noise_multiplier(index: int) -> float:
    """Return a multiplier of four digits by its number: 0 is 1.000, 1 is 1.001, 9000 is 10.00, -1 is 0.9999."""
    exponent, mantissa = divmod(index, 9 * _LEAST_MANTISSA)
    # read as it would be typed, because a product would be off in its last bit
    return float(f"{mantissa + _LEAST_MANTISSA}e{exponent - 3}")


def _index(noise_multiplier: float) -> int:
    """Return the number of the first multiplier of four digits that is not below."""
    exponent = math.floor(math.log10(noise_multiplier))
    mantissa = math.ceil(noise_multiplier / 10.0 ** (exponent - 3) - 1e-9)
    return (exponent * 9 - 1) * _LEAST_MANTISSA + mantissa
