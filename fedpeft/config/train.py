"""``[train]``: what a client does in a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from fedpeft.config.section import Section
from fedpeft.config.values import OneOf, describe
from fedpeft.errors import nearest
from fedpeft.precision import of_hardware
from fedpeft.training.optimizers import OPTIMIZERS, SCHEDULES, OptimizerOptions


def _fixed(value: str) -> str:
    """Put this machine's precision in place of ``"auto"``, so that whoever is told of it, or resumes, has the same."""
    return of_hardware() if value == "auto" else value


class TrainConfig(Section):
    """What a client does in a round; keys besides these are options of the optimiser."""

    model_config = ConfigDict(extra="allow")

    local_steps: int | None = Field(None, ge=1, description="optimiser steps a round")
    local_epochs: int | None = Field(
        None, ge=1, description="passes over the client's rows a round; 1 if neither is set"
    )
    batch_size: int = Field(16, ge=1, description="rows that are computed at once; a step's, times train.accumulation")
    accumulation: int = Field(
        1, ge=1, description="parts of batch_size rows that make one step: as one large batch, in less memory"
    )
    bucket: int = Field(
        1,
        ge=1,
        description="sort the texts of so many batches by length, to pad less; 1 is off; never at record level",
    )
    learning_rate: float = Field(1e-3, gt=0, description="step size")
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = Field("adamw", description="begins afresh each round")
    lr_schedule: Annotated[str, OneOf(SCHEDULES)] = Field("constant", description="decay over all rounds' steps")
    warmup: float = Field(
        0.0,
        ge=0,
        description="the learning rate rises over so many steps, counted over all rounds; below 1, over that share",
    )
    min_learning_rate: float = Field(0.0, ge=0, description="what the schedule ends at")
    lora_plus_ratio: float = Field(
        1.0, gt=0, description="LoRA+: factors B step by so many times the learning rate; 1 is off"
    )
    neftune_alpha: float = Field(
        0.0, ge=0, description="NEFTune: noise on tokens' embeddings while training, such as 5; 0 is off"
    )
    max_grad_norm: float | None = Field(
        None,
        ge=0,
        description="clip the whole gradient to this norm; 0 is off. If unset, 1 for language models and off for other "
        "tasks, and off at record level, which clips each row's",
    )
    proximal_mu: float = Field(0.0, ge=0, description="FedProx: mu/2 |w - w_global|^2")
    precision: Annotated[Literal["fp32", "bf16", "fp16", "auto"], AfterValidator(_fixed)] = Field(
        "fp32",
        description="of the frozen base; adapters stay in fp32. fp16, with scaled losses, is for GPUs; 'auto' is fixed "
        "as fp32 or bf16 by the machine",
    )
    gradient_checkpointing: bool = Field(
        False, description="keep each block's input alone and run it again in the backward pass: less memory, slower"
    )

    @property
    def rows_a_step(self) -> int:
        """Rows of a step's batch."""
        return self.batch_size * self.accumulation

    @property
    def options(self) -> Any:
        """The optimiser's options, an instance of its record's ``options``."""
        kind = OPTIMIZERS.find(self.optimizer).options
        extra = self.__pydantic_extra__ or {}
        return kind.model_validate({key: value for key, value in extra.items() if key in kind.model_fields})

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("train.local_steps and train.local_epochs exclude each other; give one")
        return self

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"train.warmup = {self.warmup:g}: give a share below 1, or a whole number of steps")
        schedule, least = SCHEDULES.find(self.lr_schedule), self.min_learning_rate
        if least > self.learning_rate:
            raise ValueError(
                f"train.min_learning_rate = {least:g} is above train.learning_rate = {self.learning_rate:g}"
            )
        if least and not schedule.decays:
            able = [name for name, each in SCHEDULES.all().items() if each.decays]
            raise ValueError(
                f"train.min_learning_rate = {least:g} is what a schedule ends at, and train.lr_schedule = "
                f"'{schedule.name}' never falls; allowed with it: {', '.join(able)}"
            )
        if schedule.by_round and not least:
            raise ValueError(
                f"train.lr_schedule = '{schedule.name}' is at its minimum in the last round, which would train nothing "
                "at 0; set train.min_learning_rate, such as 1e-6"
            )
        return self

    @model_validator(mode="after")
    def _options_are_the_optimizers(self) -> Self:
        given = self.__pydantic_extra__
        assert given is not None
        try:
            for key in sorted(given.keys() - OPTIMIZERS.find(self.optimizer).options.model_fields.keys()):
                self._refuse_another_ones(key, given.pop(key))
            options: OptimizerOptions = self.options
        except ValidationError as error:
            raise ValueError(describe(error, "train")) from None
        given.update(options.model_dump())
        return self

    def _refuse_another_ones(self, key: str, value: Any) -> None:
        """Refuse an option of other optimisers; one at its default says nothing, and earlier versions wrote such."""
        others = {name: each.options for name, each in OPTIMIZERS.all().items() if key in each.options.model_fields}
        if not others:
            options = OPTIMIZERS.find(self.optimizer).options
            allowed = [*type(self).model_fields, *options.model_fields]
            raise ValueError(f"unknown key 'train.{key}'. {nearest(key, allowed)}")
        for kind in others.values():
            parsed: Mapping[str, Any] = kind.model_validate({key: value}).model_dump(include={key})
            if parsed[key] == kind.model_fields[key].default:
                return
        raise ValueError(
            f"train.{key} = {parsed[key]} belongs to train.optimizer = "
            f"{' or '.join(repr(name) for name in others)}, not '{self.optimizer}'"
        )
