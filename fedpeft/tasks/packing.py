"""Rows of a batch behind each other in sequences, so that none is padded to the length of the longest.

A sequence holds whole rows, no more tokens than ``data.max_length``. Positions begin anew with each row, from which
transformers sees that no token attends to another row's (a mask of blocks). The hidden states go back to where they
would be unpacked: whatever is made of them, such as the losses of single rows, does not know of packing.

Rows are placed from the longest to the shortest, each into the first sequence that has room for it; of equal ones the
first comes first, so that a batch is packed in one way alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KEPT = "_fedpeft_packing"  # attribute of a model whose training is packed: tokens of a sequence, at most


def packing_of(model: nn.Module) -> int | None:
    """Return how many tokens a sequence may hold; None for a model whose rows are not packed."""
    length: int | None = vars(model).get(KEPT)
    return length


def sequences(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Divide rows into sequences.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each row.
    length : int
        Tokens of a sequence, at most; a longer row has one of its own.

    Returns
    -------
    list of list of int
        The rows of each sequence.
    """
    found: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((place for place, left in enumerate(room) if lengths[row] <= left), len(room))
        if place == len(room):
            found.append([])
            room.append(length)
        found[place].append(row)
        room[place] -= lengths[row]
    return found


@dataclass(frozen=True)
class Packed:
    """A batch in sequences.

    Parameters
    ----------
    inputs : mapping of str to Tensor
        ``input_ids`` and ``position_ids``, ``(s, w)``. There is no mask: it would hide from transformers that rows lie
        behind each other. What fills a sequence up is a row of its own, token by token.
    at : Tensor
        Where each token of the batch lies in all sequences behind each other, ``(b, t)``; zero for padding.
    """

    inputs: Mapping[str, Tensor]
    at: Tensor

    def unpacked(self, states: Tensor) -> Tensor:
        """Return hidden states ``(s, w, d)`` as ``(b, t, d)``; what stands where a row is padded means nothing."""
        return states.flatten(0, 1)[self.at]


def packed(inputs: Mapping[str, Tensor], length: int) -> Packed:
    """Put the rows of a batch, padded on the right, into sequences.

    Parameters
    ----------
    inputs : mapping of str to Tensor
        ``input_ids`` and ``attention_mask``, ``(b, t)``.
    length : int
        Tokens of a sequence, at most.
    """
    ids, held = inputs["input_ids"], inputs["attention_mask"].bool()
    lengths = held.sum(1).tolist()
    groups = sequences(lengths, length)
    width = max(sum(lengths[row] for row in group) for group in groups)
    at = torch.zeros(ids.shape, dtype=torch.long)
    positions = torch.zeros(len(groups), width, dtype=torch.long)
    for place, group in enumerate(groups):
        start = 0
        for row in group:
            count = torch.arange(lengths[row])
            at[row, : lengths[row]] = place * width + start + count
            positions[place, start : start + lengths[row]] = count
            start += lengths[row]
    at = at.to(ids.device)
    flat = ids.new_zeros(positions.numel())
    flat[at[held]] = ids[held]
    return Packed({"input_ids": flat.view(positions.shape), "position_ids": positions.to(ids.device)}, at)
