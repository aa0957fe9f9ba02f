"""Changes of the frozen base: set beside the original weights, and taken back without a trace."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpeft.models import num_threads
from fedpeft.state import BaseChange, LoraFactors


class BaseWeights:
    """The frozen weights of the adapted layers of a resident model.

    A changed weight is always the original plus the whole change, rounded once: nothing accumulates, whatever was set
    before. Only layers that have been changed are held twice.

    Parameters
    ----------
    weights : mapping of str to torch.nn.Parameter
        By layer, ``(d_out, d_in)``, or ``(d_in, d_out)`` for those in `transposed`.
    transposed : collection of str
        Layers that hold their weight the other way round (transformers' Conv1D).
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], transposed: frozenset[str] = frozenset()) -> None:
        self._weights = weights
        self._transposed = transposed
        self._originals: dict[str, Tensor] = {}
        self._set: dict[str, BaseChange] = {}

    def set(self, changes: Mapping[str, BaseChange]) -> None:
        """Make every layer's weight its original plus its change; layers without one get their original back."""
        for layer in [layer for layer in self._set if layer not in changes]:
            self._weights[layer].data.copy_(self._originals[layer])
            del self._set[layer]
        for layer, change in changes.items():
            if layer in self._set and _same(self._set[layer], change):
                continue
            weight = self._weights[layer].data
            if layer not in self._originals:
                self._originals[layer] = weight.clone()
            with num_threads(1):  # the last digits of a product depend on the number
                moved = dense(change)
            moved = (moved.T if layer in self._transposed else moved).to(weight.device)
            weight.copy_(self._originals[layer].double() + moved)
            self._set[layer] = change


def dense(change: BaseChange) -> Tensor:
    """Return the whole change of a layer, which has at least one piece, in float64 ``(d_out, d_in)``."""
    pieces = [matrix(piece) for piece in (change.earlier, change.last) if piece is not None]
    return pieces[0] if len(pieces) == 1 else pieces[0] + pieces[1]


def matrix(piece: LoraFactors | Tensor) -> Tensor:
    """Return one piece of a change in float64 ``(d_out, d_in)``."""
    return piece.scaling * (piece.B.double() @ piece.A.double()) if isinstance(piece, LoraFactors) else piece.double()


def _same(one: BaseChange, other: BaseChange) -> bool:
    return all(_same_piece(a, b) for a, b in ((one.earlier, other.earlier), (one.last, other.last)))


def _same_piece(one: LoraFactors | Tensor | None, other: LoraFactors | Tensor | None) -> bool:
    if isinstance(one, LoraFactors) and isinstance(other, LoraFactors):
        return _equal(one.A, other.A) and _equal(one.B, other.B)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _equal(one, other)
    return one is None and other is None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)
