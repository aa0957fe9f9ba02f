"""Layers of bitsandbytes: 4 bits in blocks, and 8 bits with a scale for each output.

* ``nf4``: 16 levels at the quantiles of a normal distribution, of blocks of 64 weights (T. Dettmers et al., "QLoRA",
  arXiv 2305.14314); ``fp4``: the same with the levels of a float of 4 bits. Their scales are quantised too unless
  ``model.double_quantization=false``.
* ``int8``: a scale for each output (T. Dettmers et al., "LLM.int8()", arXiv 2208.07339). A CPU multiplies with the
  dequantised weight in training; in scoring, and on GPUs, inputs are rounded to 8 bits too, each token by its own
  scale. What differs from the paper: its outliers are found over all rows of a batch, so that what is computed of a row
  would depend on the rows beside it. They are left out here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft.errors import ModelError
from fedpeft.quantization.record import Asked, Quantization, Saved, of_class

if TYPE_CHECKING:
    from torch import Tensor, nn

# of weights with one scale. They are counted off through the whole matrix, and on a CPU read as if each row began a new
# one (0.50): right where rows are whole blocks alone
BLOCK = 64
LIBRARY, PIP = "bitsandbytes", "'fedpeft[quantization]'"
_is_4bit, _is_8bit = of_class(LIBRARY, "Linear4bit"), of_class(LIBRARY, "Linear8bitLt")


def _dequantised(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = module.weight
    dense: Tensor = dequantize_4bit(weight.data, weight.quant_state).float()
    return dense


def _settle_4_bits(module: nn.Module) -> None:
    # in scoring, a CPU with AVX512-BF16 would pack the weights anew: an order that training does not read, that not all
    # shapes have, and other last digits than elsewhere
    layer: Any = module
    layer.support_avx512bf16_for_cpu = False
    block, inputs = int(layer.weight.quant_state.blocksize), int(layer.in_features)
    if layer.weight.device.type == "cpu" and inputs % block:
        raise ModelError(
            f"a base saved in 4 bits has layers of {inputs} inputs, which are no multiple of its blocks of {block}: "
            "bitsandbytes reads their weights wrongly on a CPU. Use a GPU, or give the base that it was made of."
        )


def _of_4_bits(levels: str, bits: float) -> Quantization:
    def settings(asked: Asked) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=levels,
            bnb_4bit_use_double_quant=asked.double,
            bnb_4bit_compute_dtype=asked.dtype,
            llm_int8_skip_modules=list(asked.plain),
        )

    def holds(module: nn.Module) -> bool:
        return _is_4bit(module) and getattr(module.weight, "quant_type", "") == levels

    def recognises(saved: Saved) -> bool:
        return bool(saved.get("load_in_4bit")) and saved.get("bnb_4bit_quant_type", "fp4") == levels

    return Quantization(
        name=levels,
        bits=bits,
        library=LIBRARY,
        pip=PIP,
        saved=LIBRARY,
        recognises=recognises,
        holds=holds,
        dequantise=_dequantised,
        settings=settings,
        doubles=True,
        settle=_settle_4_bits,
        multiple=BLOCK,
    )


def _settings_of_8_bits(asked: Asked) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=list(asked.plain))


def _scaled(module: nn.Module) -> Tensor:
    layer: Any = module
    codes = layer.weight.data if layer.state.CB is None else layer.state.CB
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # the first forward moves them
    dense: Tensor = codes.float() * (scales.float()[:, None] / 127)
    return dense


def _leave_out_outliers(module: nn.Module) -> None:
    layer: Any = module
    layer.state.threshold = 0.0


def _is_of_8_bits(saved: Saved) -> bool:
    return bool(saved.get("load_in_8bit"))


NF4 = _of_4_bits("nf4", 4.13)
FP4 = _of_4_bits("fp4", 4.13)
INT8 = Quantization(
    name="int8",
    bits=8,
    library=LIBRARY,
    pip=PIP,
    saved=LIBRARY,
    recognises=_is_of_8_bits,
    holds=_is_8bit,
    dequantise=_scaled,
    settings=_settings_of_8_bits,
    settle=_leave_out_outliers,
    steady=False,
)
