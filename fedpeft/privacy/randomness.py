"""Where a mechanism's randomness comes from: the operating system, or a seed that anybody can replay.

Noise that can be replayed can be subtracted, so `seeded` is for experiments and gives no guarantee. `secure` reads the
operating system's entropy for every number; there is no state that could be guessed or restored. Both give Gaussians in
float64, whose finite precision is an assumption of every guarantee here (I. Mironov, "On significance of the least
significant bits for differential privacy", CCS 2012).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.seeds import generator


class Randomness(Protocol):
    """Independent numbers, each drawn once."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return numbers in [0, 1), shape ``(count,)``."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, float64, on the CPU."""

    def seed(self) -> int:
        """Return a seed for a generator that is no part of the mechanism, in [0, 2**63)."""


class _Seeded:
    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def uniform(self, count: int) -> NDArray[np.float64]:
        return self._rng.random(count)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._rng.standard_normal(tuple(shape)))

    def seed(self) -> int:
        return int(self._rng.integers(2**63))


class _Secure:
    def uniform(self, count: int) -> NDArray[np.float64]:
        numbers: NDArray[np.float64] = (_words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return numbers

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Box and Muller's transform: two uniform numbers make two normal ones."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(1.0 - self.uniform(half)))  # of (0, 1], so that the logarithm is finite
        angle = 2.0 * np.pi * self.uniform(half)
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(pairs[:count].reshape(tuple(shape)))

    def seed(self) -> int:
        return int(_words(1)[0] >> np.uint64(1))


def _words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def secure() -> Randomness:
    """Return the operating system's entropy."""
    return _Secure()


def seeded(seed: int, *purpose: str | int) -> Randomness:
    """Return numbers that follow from a run's seed and what they are for; see `fedpeft.seeds`."""
    return _Seeded(generator(seed, *purpose))
