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
        Of the share of all rounds' steps after the warm-up that is done, in [0, 1): how much is left of the way from
        the minimum to the whole learning rate.
    by_round : bool
        Whether that share is of rounds, the running one included, so that the rate is the same in all of a round.
    """

    name: str
    description: str
    factor: Callable[[float], float]
    by_round: bool = False

    @property
    def decays(self) -> bool:
        """Whether the learning rate ever falls."""
        return any(self.factor(progress / 16) < 1 for progress in range(16))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


CONSTANT = Schedule("constant", "no decay", lambda progress: 1.0)
LINEAR = Schedule("linear", "straight down to the minimum", lambda progress: 1 - progress)
COSINE = Schedule("cosine", "down to the minimum by half a cosine", _half_cosine)
# FlowerTune's: of the round's number, from 1, so that the last round is at the minimum
COSINE_BY_ROUND = Schedule(
    "cosine-by-round",
    "down by half a cosine of rounds, constant within each; the last round is at the minimum",
    _half_cosine,
    by_round=True,
)
