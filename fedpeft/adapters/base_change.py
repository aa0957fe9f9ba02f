"""Changes of the frozen base: set beside the original weights, and taken back without a trace."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpeft.adapters.state import BaseChange, LoraFactors
from fedpeft.errors import AdapterError
from fedpeft.models import num_threads

MOVABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # with digits to add a small change to


def check_plain(layers: Mapping[str, nn.Module], what: str) -> None:
    """Raise AdapterError if a layer's weight is no plain matrix of numbers, as those of quantised bases are not.

    Parameters
    ----------
    layers : mapping of str to torch.nn.Module
        By name, the base's own.
    what : str
        The setting that reads or changes the base's weights, for the error.
    """
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        kind = type(layer).__name__
        if not isinstance(weight, Tensor):
            held = "has no weight of its own"
        elif type(weight.data) is not Tensor:  # torchao's claim to be float32
            held = f"holds its weight as {type(weight.data).__name__}"
        elif weight.dtype not in MOVABLE or tuple(weight.shape) != _shape(layer, weight):
            held = f"holds its weight as {str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}"
        else:
            continue
        raise AdapterError(
            f"{what} needs the base's weights as plain matrices, to change them or to take a part out of them, and "
            f"layer '{name}' ({kind}) {held}. Give a base that is not quantised, or a strategy and an adapter that "
            "leave the base as it is, as the defaults do."
        )


def _shape(layer: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """Return the shape that a layer's weight has by what the layer says of itself."""
    if hasattr(layer, "in_features"):
        return (int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]
    return tuple(weight.shape) if weight.ndim == 2 else ()


class BaseWeights:
    """The frozen weights of the adapted layers of a resident model.

    A changed weight is always the original plus the whole change, rounded once: nothing accumulates, whatever was set
    before. Only layers that have been changed are held twice.

    Parameters
    ----------
    weights : mapping of str to Tensor
        By layer, written to in place, ``(d_out, d_in)``, or ``(d_in, d_out)`` for those in `transposed`.
    transposed : collection of str
        Layers that hold their weight the other way round (transformers' Conv1D).
    """

    def __init__(self, weights: Mapping[str, Tensor], transposed: frozenset[str] = frozenset()) -> None:
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
