"""Stochastic gradient descent, with momentum if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from fedpeft.training.optimizers.record import Optimizer, OptimizerOptions

if TYPE_CHECKING:
    import torch


class SgdOptions(OptimizerOptions):
    """Options of ``train.optimizer = "sgd"``."""

    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last step's direction that is kept")
    weight_decay: float = Field(0.0, ge=0, description="L2: added to the gradient, times the weight")


def _build(
    parameters: Mapping[str, torch.nn.Parameter], learning_rate: float, options: SgdOptions
) -> torch.optim.Optimizer:
    import torch

    return torch.optim.SGD(
        list(parameters.values()), lr=learning_rate, momentum=options.momentum, weight_decay=options.weight_decay
    )


SGD = Optimizer(
    "sgd",
    "gradient descent, with momentum if asked for",
    SgdOptions,
    _build,
    first_step=lambda gradient, learning_rate: -learning_rate * gradient,
    state_floats=0,
    elementwise=True,
    plain=lambda options: not options.momentum,
)
