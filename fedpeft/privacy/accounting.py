"""What a sequence of subsampled Gaussian mechanisms costs, and how much noise a budget asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft.privacy.settings import Accountant


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
