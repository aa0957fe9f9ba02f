"""``[model]``: the frozen base."""

from __future__ import annotations

from pydantic import Field

from fedpeft.config.section import Section


class ModelConfig(Section):
    """The frozen base model."""

    name: str | None = Field(None, description="a transformers folder, a hub id, or preset:NAME")
    task: str | None = Field(None, description="what the model is for; follows from the data's columns if unset")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="run code that a hub repository brings")
