"""Lion, the sign of an average of gradients: X. Chen et al., NeurIPS 2023, arXiv 2302.06675.

u = sign(beta1 m + (1 - beta1) g);   w <- w - lr (u + weight_decay w);   m <- beta2 m + (1 - beta2) g
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedpeft.training.optimizers.record import Optimizer, OptimizerOptions

if TYPE_CHECKING:
    import torch


class LionOptions(OptimizerOptions):
    """Options of ``train.optimizer = "lion"``."""

    weight_decay: float = Field(0.0, ge=0, description="decoupled: the weight shrinks by it times the learning rate")
    lion_beta1: float = Field(0.9, ge=0, lt=1, description="share of the average in the sign that is stepped by")
    lion_beta2: float = Field(0.99, ge=0, lt=1, description="share of the average that is kept")


def _build(
    parameters: Mapping[str, torch.nn.Parameter], learning_rate: float, options: LionOptions
) -> torch.optim.Optimizer:
    import torch

    class Lion(torch.optim.Optimizer):
        """The rule, in torch's form."""

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
            """Step every parameter that has a gradient."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    if (gradient := parameter.grad) is None:
                        continue
                    state = self.state[parameter]
                    average = state.setdefault("average", torch.zeros_like(parameter))
                    direction = torch.lerp(gradient, average, group["beta1"]).sign_()
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"])
                    average.lerp_(gradient, 1 - group["beta2"])

    settings = {"lr": learning_rate, "weight_decay": options.weight_decay}
    return Lion(list(parameters.values()), {**settings, "beta1": options.lion_beta1, "beta2": options.lion_beta2})


LION = Optimizer(
    "lion",
    "the sign of an average of gradients",
    LionOptions,
    _build,
    first_step=lambda gradient, learning_rate: -learning_rate * gradient.sign(),
    state_floats=1,
    elementwise=True,
)
