"""Factors drawn anew in the middle of a run: by server and clients alike, from the run's seed, so that none travel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.adapters.embeddings import is_embedding
from fedpeft.adapters.state import Role, role_of
from fedpeft.seeds import generator


def draw_a(seed: int, draw: int, layer: str, rank: int, d_in: int) -> Tensor:
    """Draw A of one layer as PEFT draws it by default, uniform in +-1/sqrt(d_in), and of an embedding in +-1.

    An embedding's input has a single 1 among d_in zeros: so drawn, A makes of it numbers of the size that it makes of
    a linear layer's.

    Parameters
    ----------
    seed : int
        The run's seed.
    draw : int
        Which draw, such as a round's number.
    layer : str
        Name of the layer.
    rank, d_in : int
        Shape of A; a lower rank gets the first rows of a higher one.

    Returns
    -------
    Tensor
        ``(rank, d_in)``, float32.
    """
    bound = 1.0 if is_embedding(layer) else 1 / math.sqrt(d_in)
    return torch.from_numpy(generator(seed, "draw", draw, layer).uniform(-bound, bound, (rank, d_in))).float()


def first_ranks(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Cut the factors among named tensors down to their first ranks; all else stays the same object."""
    cuts = {Role.A: (slice(rank),), Role.B: (slice(None), slice(rank))}
    return {
        name: tensor[cuts[role]].contiguous() if (role := role_of(name)) in cuts else tensor
        for name, tensor in tensors.items()
    }
