"""``[adapter]``: what is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from fedpeft.adapters.kinds import (
    INITS,
    INITS_FROM_DATA,
    INITS_OF_BASE,
    WITHOUT_DROPOUT,
    AdapterInit,
    AdapterKind,
    Head,
)
from fedpeft.config.section import Section
from fedpeft.config.values import Names, Ranks, split_list


class AdapterConfig(Section):
    """What is trained."""

    kind: AdapterKind = Field(
        "lora",
        description="lora trains A and B; ffa-lora B only, A frozen and shared; lora-xs a square R between singular "
        "vectors of the base's weights, lora-sb one between those of a gradient on public rows; rslora scales by alpha "
        "/ sqrt(rank); dora, adalora (no rank is pruned), vera, randlora, miss, loha and lokr are as in PEFT",
    )
    init: AdapterInit = Field(
        "default",
        description="how A is drawn (B starts at zero); for lora and rslora also pissa and olora, and eva and lora-ga "
        "from public rows; lora-sb-gradient, from public rows too, is that of lora-sb",
    )
    init_data: str | None = Field(
        None, description="PUBLIC rows for eva, lora-ga and lora-sb-gradient, a file or folder"
    )
    rank: int = Field(8, ge=1, description="rank r of the update; the largest of ranks, where they are given")
    ranks: Ranks | None = Field(
        None, description="ranks of the clients, dealt in turn, such as 4,8,16, for methods that merge mixed ranks"
    )
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank; not that of miss and vera")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A while training")
    targets: Names | None = Field(
        None, min_length=1, description="module names to adapt, or all-linear; query and value if unset"
    )
    head: Head | None = Field(
        None,
        description="the classifier head (with an untrained pooler): averaged (shared), kept by each client (local), "
        "or left as drawn (frozen); if unset as the method has it, which is shared for all but personalised ones",
    )

    @model_validator(mode="before")
    @classmethod
    def _rank_is_the_largest(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not values.get("ranks") or "rank" in values:
            return values
        ranks = split_list(values["ranks"])
        if not isinstance(ranks, list | tuple):
            return values
        numbers = [int(rank) for rank in ranks if str(rank).isdecimal()]
        return {**values, "rank": max(numbers, default=1)}

    @model_validator(mode="before")
    @classmethod
    def _lora_sb_begins_at_a_gradient(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            if values.get("init") == "lora-sb-gradient" and "kind" not in values:
                return {**values, "kind": "lora-sb"}
            if values.get("kind") == "lora-sb" and values.get("init", "default") == "default":
                return {**values, "init": "lora-sb-gradient"}
        return values

    @model_validator(mode="after")
    def _ranks_agree(self) -> Self:
        if self.ranks is not None and self.rank != max(self.ranks):
            raise ValueError(
                f"adapter.rank = {self.rank} is not the largest of adapter.ranks = {','.join(map(str, self.ranks))}; "
                "give adapter.ranks alone"
            )
        return self

    @model_validator(mode="after")
    def _suits_the_kind(self) -> Self:
        if self.kind not in INITS[self.init]:
            allowed = ", ".join(init for init, kinds in INITS.items() if self.kind in kinds)
            raise ValueError(
                f"adapter.init = '{self.init}' is not for adapter.kind = '{self.kind}'. Allowed: {allowed}; "
                f"'{self.init}' goes with {', '.join(sorted(INITS[self.init]))}"
            )
        if self.init in INITS_OF_BASE and len(set(self.ranks or ())) > 1:
            raise ValueError(
                f"adapter.init = '{self.init}' takes ranks out of the base, which the clients with fewer of "
                f"adapter.ranks = {','.join(map(str, self.ranks or ()))} would miss; use another adapter.init"
            )
        if self.dropout and self.kind in WITHOUT_DROPOUT:
            raise ValueError(
                f"adapter.dropout = {self.dropout} is not for adapter.kind = '{self.kind}', which can drop no inputs; "
                "leave it at 0"
            )
        if self.init in INITS_FROM_DATA and self.init_data is None:
            what = f"adapter.init = '{self.init}'"
            without = ""
            if self.kind == "lora-sb":
                what = "adapter.kind = 'lora-sb' begins at a gradient (adapter.init = 'lora-sb-gradient'), and"
                without = "; without such rows use adapter.kind = 'lora-xs'"
            raise ValueError(
                f"{what} needs adapter.init_data: a file or folder of public rows with the run's columns{without}"
            )
        if self.init not in INITS_FROM_DATA and self.init_data is not None:
            raise ValueError(
                f"adapter.init_data = '{self.init_data}' belongs to adapter.init = "
                f"{' or '.join(repr(init) for init in sorted(INITS_FROM_DATA))}, not to '{self.init}'; drop it"
            )
        return self

    @property
    def scaling(self) -> float:
        """What the update is multiplied with."""
        return self.scaling_of(self.rank)

    def scaling_of(self, rank: int) -> float:
        """Return the scaling of a client of some rank: alpha / rank, and of rslora alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(rank) if self.kind == "rslora" else rank)
