"""Seeds for everything random in a run, each derived from the run's seed and the name of its use.

Deriving instead of drawing in sequence means that no result depends on the order of events: a client gets the same
batches whichever worker trains it, however often it is repeated, and after a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return the seed of one purpose, a whole number in [0, 2**63).

    Parameters
    ----------
    seed : int
        The run's seed.
    *purpose : str or int
        What the seed is for, such as ``"batches", server_round, client_id``.
    """
    text = "\x1f".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the NumPy generator of one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))
