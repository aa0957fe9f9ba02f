"""``[train]``: what a client does in a round."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedpeft.config.section import Section


class TrainConfig(Section):
    """What a client does in a round."""

    local_steps: int | None = Field(None, ge=1, description="optimiser steps a round")
    local_epochs: int | None = Field(
        None, ge=1, description="passes over the client's rows a round; 1 if neither is set"
    )
    batch_size: int = Field(16, ge=1, description="rows a step")
    learning_rate: float = Field(1e-3, gt=0, description="step size")
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="begins afresh each round")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, L2 for sgd")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay over all rounds' steps")
    max_grad_norm: float = Field(0.0, ge=0, description="clip the whole gradient to this norm; 0 is off")
    proximal_mu: float = Field(0.0, ge=0, description="FedProx: mu/2 |w - w_global|^2")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the frozen base; adapters stay in fp32")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("train.local_steps and train.local_epochs exclude each other; give one")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"train.momentum = {self.momentum} belongs to train.optimizer = 'sgd', not '{self.optimizer}'"
            )
        return self
