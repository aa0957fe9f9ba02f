"""Frozen bases in fewer bits: one file a library or format, and the registry that finds them by name.

This loads neither torch nor transformers: configurations ask it too.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from fedpeft.quantization.awq import AWQ
from fedpeft.quantization.bitsandbytes import FP4, INT8, NF4
from fedpeft.quantization.gptq import GPTQ
from fedpeft.quantization.record import Asked, Quantization, Saved
from fedpeft.quantization.torchao import INT8_WEIGHT_ONLY
from fedpeft.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["QUANTIZATIONS", "Asked", "Quantization", "dense_weight", "held_as", "num_weights", "saved_as"]

QUANTIZATIONS: Registry[Quantization] = Registry(
    "model.quantization", "fedpeft.quantizations", (NF4, FP4, INT8, INT8_WEIGHT_ONLY, AWQ, GPTQ)
)


@cache
def _methods() -> tuple[Quantization, ...]:
    # looking for other packages takes 10 ms, and every module of a model is asked
    return tuple(QUANTIZATIONS.all().values())


def held_as(module: nn.Module) -> Quantization | None:
    """Return how a layer holds its weight in fewer bits; None where it does not."""
    return next((each for each in _methods() if each.holds(module)), None)


def saved_as(saved: Saved) -> Quantization | None:
    """Return what a base's ``quantization_config`` says that it is saved as; None where that is nothing known here."""
    kind = str(getattr(saved.get("quant_method"), "value", saved.get("quant_method")))
    if kind == "None" and (saved.get("load_in_4bit") or saved.get("load_in_8bit")):
        kind = NF4.saved  # as older folders have it
    same = (each for each in QUANTIZATIONS.all().values() if each.saved == kind)
    return next((each for each in same if each.recognises(saved)), None)


def dense_weight(module: nn.Module) -> Tensor:
    """Return a linear layer's weight as a matrix of numbers, whatever the layer holds it as.

    Parameters
    ----------
    module : torch.nn.Module
        A linear layer of a base, quantised or not, or transformers' transposed Conv1D.

    Returns
    -------
    Tensor
        In float32, ``(d_out, d_in)``, where the layer is; a copy, unless the layer holds it just so.
    """
    method = held_as(module)
    if method is not None:
        return method.dequantise(module)
    weight: Any = module.weight
    if hasattr(module, "nf") and not hasattr(module, "in_features"):  # Conv1D
        weight = weight.T
    dense: Tensor = weight.detach().float()
    return dense


def num_weights(model: nn.Module) -> int:
    """Return how many weights a model has, those that lie two in a byte counted as two."""
    import torch

    packed = {
        id(module.weight): int(module.in_features) * int(module.out_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight.dtype == torch.uint8
    }
    return sum(packed.get(id(tensor), tensor.numel()) for tensor in model.parameters())
