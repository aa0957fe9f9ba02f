"""Shapes that options of a kind must suit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def divides(option: str, *, outputs: bool = False, inputs: bool = False, even: bool = False) -> Callable[..., str]:
    """Return what tells whether an option, a number or size of blocks, divides a layer's outputs and inputs.

    Parameters
    ----------
    option : str
        Field of PEFT's configuration.
    outputs, inputs : bool
        What it must divide.
    even : bool
        Whether it must be even too.
    """
    what = " and ".join(name for name, asked in (("outputs", outputs), ("inputs", inputs)) if asked)

    def misfit(settings: Any, d_out: int, d_in: int) -> str:
        common = math.gcd(d_out if outputs else 0, d_in if inputs else 0)
        size, step = int(getattr(settings, option)), 2 if even else 1
        if size > 0 and size % step == 0 and common % size == 0:
            return ""
        able = [number for number in range(step, common + 1, step) if common % number == 0]
        if not able:
            return (
                f"adapter.{option} must be even and divide its {what}, which are odd; leave it out of adapter.targets"
            )
        best = max((number for number in able if number <= size), default=able[0])
        return f"adapter.{option} = {size} must{' be even and' if even else ''} divide its {what}; set it to {best}"

    return misfit


def at_most_all_entries(settings: Any, d_out: int, d_in: int) -> str:
    """Tell whether an update with ``n_frequency`` numbers has room in a layer."""
    if settings.n_frequency <= d_out * d_in:
        return ""
    return f"adapter.n_frequency = {settings.n_frequency} is more than its {d_out * d_in} weights; set it lower"
