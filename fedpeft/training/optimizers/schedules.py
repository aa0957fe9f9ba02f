"""How the learning rate goes over all steps of all rounds: one row each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How the learning rate decays.

    Parameters
    ----------
    name : str
        What ``train.lr_schedule`` takes.
    description : str
        One line.
    factor : callable
        Of the share of all rounds' steps that is done, in [0, 1): what the learning rate is multiplied with.
    """

    name: str
    description: str
    factor: Callable[[float], float]


CONSTANT = Schedule("constant", "no decay", lambda progress: 1.0)
LINEAR = Schedule("linear", "straight down to zero", lambda progress: 1 - progress)
COSINE = Schedule("cosine", "down to zero by half a cosine", lambda progress: 0.5 * (1 + math.cos(math.pi * progress)))
