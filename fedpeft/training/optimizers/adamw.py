"""Adam with decoupled weight decay: I. Loshchilov and F. Hutter, arXiv 1711.05101."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from fedpeft.training.optimizers.record import Optimizer, OptimizerOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPS = 1e-8  # torch's; it keeps the signs of rounding errors out of the first step


class AdamWOptions(OptimizerOptions):
    """Options of ``train.optimizer = "adamw"``."""

    weight_decay: float = Field(0.0, ge=0, description="decoupled: the weight shrinks by it times the learning rate")


def _build(
    parameters: Mapping[str, torch.nn.Parameter], learning_rate: float, options: AdamWOptions
) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(list(parameters.values()), lr=learning_rate, weight_decay=options.weight_decay)


def _first_step(gradient: Tensor, learning_rate: float) -> Tensor:
    """Return the first step, in which both corrected moments are the gradient's own."""
    return -learning_rate * (gradient / (gradient.abs() + EPS))


ADAMW = Optimizer(
    "adamw", "Adam with decoupled weight decay", AdamWOptions, _build, _first_step, state_floats=2, elementwise=True
)
