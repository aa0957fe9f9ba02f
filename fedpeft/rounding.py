"""How an epsilon is written wherever one is shown: never smaller than it is."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal

EXACT = Context(prec=400, rounding=ROUND_CEILING)  # more digits than any float has before its point


def upwards(epsilon: float, digits: int = 3) -> str:
    """Write what was spent, rounded UP.

    Parameters
    ----------
    epsilon : float
        As the accountant gave it.
    digits : int
        Behind the point.
    """
    if not math.isfinite(epsilon):
        return "infinity"
    shortest = Decimal(repr(float(epsilon)))  # so that 2.999 is not taken for a little more
    return f"{shortest.quantize(Decimal(1).scaleb(-digits), context=EXACT):f}"


def as_given(budget: float) -> str:
    """Write a budget as somebody typed it, with all its digits."""
    if not math.isfinite(budget):
        return "inf"
    return f"{Decimal(repr(float(budget))).normalize(EXACT):f}"
