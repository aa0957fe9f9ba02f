"""AdamW of bitsandbytes: moments in 8 bits, or in memory that a GPU may page out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from fedpeft.chatter import silence
from fedpeft.deferred import need
from fedpeft.training.optimizers.record import Optimizer, OptimizerOptions

if TYPE_CHECKING:
    import torch

EPS = 1e-8


class PagedOptions(OptimizerOptions):
    """Options of bitsandbytes' AdamW."""

    weight_decay: float = Field(0.0, ge=0, description="decoupled: the weight shrinks by it times the learning rate")


class QuantisedOptions(PagedOptions):
    """Options of bitsandbytes' AdamW in 8 bits."""

    min_8bit_size: int = Field(4096, ge=0, description="smaller tensors keep their moments in 32 bits")


def adamw_of_bitsandbytes(name: str, description: str, cls: str, *, bits: int) -> Optimizer:
    """Return the record of one of bitsandbytes' classes, whose steps are AdamW's up to the moments' rounding.

    Parameters
    ----------
    name, description : str
        See `Optimizer`.
    cls : str
        The class in ``bitsandbytes.optim``.
    bits : int
        Of a moment.
    """
    return Optimizer(
        name,
        description,
        PagedOptions if bits == 32 else QuantisedOptions,
        _builder(cls),
        lambda gradient, learning_rate: -learning_rate * (gradient / (gradient.abs() + EPS)),
        state_floats=2 * bits / 32,
        needs="bitsandbytes",
        extra="quantization",
    )


def _builder(cls: str) -> Callable[[Mapping[str, torch.nn.Parameter], float, PagedOptions], torch.optim.Optimizer]:
    def build(
        parameters: Mapping[str, torch.nn.Parameter], learning_rate: float, options: PagedOptions
    ) -> torch.optim.Optimizer:
        silence()
        need(["bitsandbytes"])
        import bitsandbytes

        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # which pages by itself
        built: torch.optim.Optimizer = getattr(bitsandbytes.optim, cls)(
            list(parameters.values()), lr=learning_rate, **options.model_dump()
        )
        return built

    return build
