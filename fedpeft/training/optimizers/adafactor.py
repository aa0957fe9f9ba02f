"""Adafactor: the second moment of a matrix by its rows' and columns' means. N. Shazeer and M. Stern, arXiv 1804.04235.

As transformers' trainer takes it: without relative steps and without scaling by the weight's own size, by which a
factor that begins at zero would hardly move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from fedpeft.training.optimizers.record import Optimizer, OptimizerOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPS = 1e-30  # the paper's, added to squares


class AdafactorOptions(OptimizerOptions):
    """Options of ``train.optimizer = "adafactor"``."""

    weight_decay: float = Field(0.0, ge=0, description="decoupled: the weight shrinks by it times the learning rate")
    clip_threshold: float = Field(1.0, gt=0, description="largest root mean square of a tensor's update")


def _build(
    parameters: Mapping[str, torch.nn.Parameter], learning_rate: float, options: AdafactorOptions
) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    built: torch.optim.Optimizer = Adafactor(
        list(parameters.values()),
        lr=learning_rate,
        clip_threshold=options.clip_threshold,
        weight_decay=options.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )
    return built


def _first_step(gradient: Tensor, learning_rate: float) -> Tensor:
    """Return the first step, in which the moments are those of the gradient alone."""
    squares = gradient.square() + EPS
    if gradient.ndim >= 2:
        down, across = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)  # (m, 1), (1, n)
        squares = down * across / down.mean(-2, keepdim=True)
    update = gradient / squares.sqrt()
    return -learning_rate * update / update.square().mean().sqrt().clamp(min=1.0)


ADAFACTOR = Optimizer(
    "adafactor",
    "second moments of matrices by rows and columns alone",
    AdafactorOptions,
    _build,
    _first_step,
    state_floats=0,
)
