"""``[model]``: the frozen base."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fedpeft.config.section import Section
from fedpeft.errors import ConfigError, nearest
from fedpeft.quantization import QUANTIZATIONS

CHECKPOINT: Literal["checkpoint"] = "checkpoint"


def _probability(value: object) -> object:
    """Read a probability or the one word; pydantic's own message would name both types in turn."""
    if value == CHECKPOINT:
        return value
    try:
        probability = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        probability = -1.0
    if isinstance(value, bool) or not 0 <= probability < 1:
        raise ValueError(f"model.dropout = {value!r}: give a probability from 0 to below 1, or '{CHECKPOINT}'")
    return probability


NONE = "none"  # takes back what an earlier layer asked for


def _method(value: object) -> object:
    if value is None or value == NONE:
        return None
    usable = [*(name for name, each in QUANTIZATIONS.all().items() if each.settings is not None), NONE]
    try:
        method = QUANTIZATIONS.find(str(value))
    except ConfigError as error:
        unknown = f"unknown model.quantization '{value}'."  # the registry would name what only saved bases have too
        said = str(error)
        raise ValueError(f"{unknown} {nearest(str(value), usable)}" if said.startswith(unknown) else said) from None
    if method.settings is None:
        raise ValueError(
            f"model.quantization = '{value}': only a base that was saved so is held so. Give its folder as model.name "
            f"and leave this unset, or take one of: {', '.join(usable)}"
        )
    return method.name


class ModelConfig(Section):
    """The frozen base model."""

    name: str | None = Field(None, description="a transformers folder, a hub id, or preset:NAME")
    task: str | None = Field(None, description="what the model is for; follows from the data's columns if unset")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="run code that a hub repository brings")
    dropout: Annotated[float | Literal["checkpoint"], BeforeValidator(_probability)] = Field(
        0.0, description="of the frozen base in training: 0 is fastest; 'checkpoint' takes what config.json says"
    )
    quantization: Annotated[str | None, BeforeValidator(_method)] = Field(
        None, description="hold the frozen base in fewer bits; adapter and head are trained in full precision"
    )
    double_quantization: bool | None = Field(
        None, description="quantise the scales too, of the methods of 4 bits, which do unless this is false"
    )

    @model_validator(mode="after")
    def _doubles(self) -> Self:
        method = None if self.quantization is None else QUANTIZATIONS.find(self.quantization)
        if self.double_quantization is None or (method is not None and method.doubles):
            return self
        able = ", ".join(name for name, each in QUANTIZATIONS.all().items() if each.doubles)
        raise ValueError(
            f"model.double_quantization is for model.quantization = {able}, and here that is "
            f"{repr(self.quantization) if self.quantization else 'unset'}; drop it"
        )
