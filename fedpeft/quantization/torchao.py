"""Layers of torchao: 8 bits with a scale for each output, multiplied as the dequantised weight.

Nothing is rounded but the weights, in training and in scoring alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from fedpeft.quantization.record import Asked, Quantization

if TYPE_CHECKING:
    from torch import Tensor, nn


def _settings(asked: Asked) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(asked.plain))


def _holds(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__module__.partition(".")[0] == "torchao"


def _dequantised(module: nn.Module) -> Tensor:
    dense: Tensor = cast(Any, module.weight).dequantize().detach().float()
    return dense


INT8_WEIGHT_ONLY = Quantization(
    name="int8-weight-only",
    bits=8,
    library="torchao",
    pip="'fedpeft[quantization]'",
    saved="torchao",
    recognises=lambda saved: True,
    holds=_holds,
    dequantise=_dequantised,
    settings=_settings,
)
