"""Muon: momentum whose singular values are made alike. K. Jordan, https://kellerjordan.github.io/posts/muon, 2024.

    m <- mu m + (1 - mu) g;   u = NS((1 - mu) g + mu m);   w <- w - lr (0.2 sqrt(max(rows, columns)) u + weight_decay w)

NS is five steps X <- a X + b X X^T X + c (X X^T)^2 X of Newton and Schulz, in float32, from X / |X|. The factor of
J. Liu et al., arXiv 2502.16982, gives the update the size of AdamW's, so that the same learning rate suits all tensors:
those that are no matrices, and heads, are stepped by AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedpeft.training.optimizers.record import Optimizer, OptimizerOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # Jordan's
HEAD = ".modules_to_save."  # PEFT's name for what is trained whole
MATCHED = 0.2  # root mean square of AdamW's updates, as measured by Liu et al.


class MuonOptions(OptimizerOptions):
    """Options of ``train.optimizer = "muon"``."""

    weight_decay: float = Field(0.0, ge=0, description="decoupled: the weight shrinks by it times the learning rate")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="share of the last step's direction that is kept")


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix ``(m, n)`` of the same singular vectors, with singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    wide: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def _size(matrix: Tensor) -> float:
    return MATCHED * math.sqrt(max(matrix.shape))


def _build(
    parameters: Mapping[str, torch.nn.Parameter], learning_rate: float, options: MuonOptions
) -> torch.optim.Optimizer:
    import torch

    matrices = {id(each) for name, each in parameters.items() if each.ndim == 2 and HEAD not in name}
    momentum = options.muon_momentum

    class Muon(torch.optim.AdamW):
        """Muon's steps of matrices, and AdamW's of all else."""

        def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
            """Step every parameter that has a gradient."""
            stepped = {}
            for group in self.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in matrices and parameter.grad is not None:
                        self._step_matrix(parameter, group)
                        stepped[parameter], parameter.grad = parameter.grad, None
            super().step()
            for parameter, gradient in stepped.items():
                parameter.grad = gradient

        @torch.no_grad()
        def _step_matrix(self, matrix: torch.nn.Parameter, group: Mapping[str, Any]) -> None:
            assert matrix.grad is not None
            state = self.state[matrix]
            average = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
            average.lerp_(matrix.grad, 1 - momentum)
            update = orthogonal(matrix.grad.lerp(average, momentum))
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-group["lr"] * _size(matrix))

    return Muon(list(parameters.values()), lr=learning_rate, weight_decay=options.weight_decay)


def _first_step(gradient: Tensor, learning_rate: float) -> Tensor:
    """Return the first step of a matrix; of all else it is AdamW's."""
    if gradient.ndim != 2:
        return -learning_rate * gradient / (gradient.abs() + 1e-8)
    return -learning_rate * _size(gradient) * orthogonal(gradient)


MUON = Optimizer(
    "muon", "momentum of like singular values for factors, AdamW for all else", MuonOptions, _build, _first_step, 1
)
