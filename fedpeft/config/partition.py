"""``[partition]``: who holds what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fedpeft.config.section import Section

PartitionScheme = Literal[
    "iid", "dirichlet", "pathological", "shard", "natural", "domain", "linear", "square", "exponential"
]


class PartitionConfig(Section):
    """Who holds what."""

    scheme: PartitionScheme = Field("iid", description="how rows are divided among clients")
    by: str | None = Field(None, description="column whose values are the clients; implies natural")
    alpha: float | None = Field(
        None, gt=0, description="concentration of dirichlet, small is skewed; if unset 0.5, and domain deals evenly"
    )
    classes_per_client: int = Field(2, ge=1, description="labels a client sees, for pathological")
    shards_per_client: int = Field(2, ge=1, description="label-sorted shards a client gets, for shard")
    min_examples: int = Field(1, ge=1, description="fewest rows a client may hold")

    @property
    def concentration(self) -> float:
        """``alpha``, or 0.5 where it is not set."""
        return 0.5 if self.alpha is None else self.alpha

    @model_validator(mode="before")
    @classmethod
    def _by_means_natural(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("by") is not None:
            scheme = values.get("scheme", "natural")
            if scheme != "natural":
                raise ValueError(
                    f"partition.by = '{values['by']}' implies partition.scheme = 'natural', but '{scheme}' was given; "
                    "drop one"
                )
            return {**values, "scheme": "natural"}
        return values

    @model_validator(mode="after")
    def _natural_needs_by(self) -> Self:
        if self.scheme == "natural" and self.by is None:
            raise ValueError("partition.scheme = 'natural' needs partition.by, the column that names each row's client")
        return self
