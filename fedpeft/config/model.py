"""``[model]``: the frozen base."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedpeft.config.section import Section

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


class ModelConfig(Section):
    """The frozen base model."""

    name: str | None = Field(None, description="a transformers folder, a hub id, or preset:NAME")
    task: str | None = Field(None, description="what the model is for; follows from the data's columns if unset")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="run code that a hub repository brings")
    dropout: Annotated[float | Literal["checkpoint"], BeforeValidator(_probability)] = Field(
        0.0, description="of the frozen base in training: 0 is fastest; 'checkpoint' takes what config.json says"
    )
