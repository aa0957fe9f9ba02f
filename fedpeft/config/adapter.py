"""``[adapter]``: what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedpeft.adapters.kinds import INITS, KINDS, Head, Init, Kind
from fedpeft.adapters.kinds.options import Option, typed
from fedpeft.config.section import Section
from fedpeft.config.values import Joined, Ranks, Targets, split_list
from fedpeft.errors import ConfigError


class AdapterConfig(Section):
    """What is trained. Keys that are not named here are PEFT's own options of the kind."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(
        "lora",
        description="lora trains A and B; ffa-lora B only, A frozen and shared; lora-xs a square R between singular "
        "vectors of the base's weights, lora-sb one between those of a gradient on public rows; rslora scales by alpha "
        "/ sqrt(rank); all others are PEFT's (of adalora no rank is pruned), each with its own options here",
    )
    init: str = Field(
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
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank, in kinds that have an alpha")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A while training")
    targets: Targets | None = Field(
        None,
        min_length=1,
        description="what to adapt: names of modules or of their last parts (q_proj,v_proj, lm_head, embed_tokens, "
        "and experts by module and parameter, experts.down_proj), all-linear, or re: and a regular expression that "
        "matches whole names of linear layers; query and value if unset",
    )
    layers: Joined | None = Field(
        None,
        description="which of the model's blocks are adapted: last:2, first:3, or their numbers from 0, such as 0,1,5; "
        "all if unset",
    )
    start: str | None = Field(
        None,
        description="a folder with a LoRA adapter, of a run or of PEFT, that the run begins with; kind, rank, alpha "
        "and targets follow from it where they are unset",
    )
    start_sha256: str | None = Field(
        None, description="what the tensors in adapter.start hash to; found when the run begins, and checked after"
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
    def _kind_and_start_go_together(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if "kind" not in values and (kind := INITS.find(str(values.get("init", "default"))).kind):
            return {**values, "kind": kind}
        inits = KINDS.find(str(values.get("kind", "lora"))).inits
        if values.get("init", "default") == "default" and "default" not in inits:
            return {**values, "init": inits[0]}
        return values

    @model_validator(mode="after")
    def _options_are_of_the_kind(self) -> Self:
        extra = self.__pydantic_extra__ or {}
        extra.update(typed(self.facts, extra, type(self).model_fields))
        return self

    @model_validator(mode="after")
    def _ranks_agree(self) -> Self:
        if given := self.model_fields_set & self.facts.lacks:
            key = max(given & {"rank", "alpha"}, default=min(given))
            raise ValueError(f"adapter.kind = '{self.kind}' has no {key.removesuffix('s')}; drop adapter.{key}")
        if self.ranks is not None and self.rank != max(self.ranks):
            raise ValueError(
                f"adapter.rank = {self.rank} is not the largest of adapter.ranks = {','.join(map(str, self.ranks))}; "
                "give adapter.ranks alone"
            )
        return self

    @model_validator(mode="after")
    def _suits_the_kind(self) -> Self:
        kind, init = self.facts, self.beginning
        if init.name not in kind.inits:
            goes = sorted(name for name, other in KINDS.all().items() if init.name in other.inits)
            raise ValueError(
                f"adapter.init = '{self.init}' is not for adapter.kind = '{self.kind}'. Allowed: "
                f"{', '.join(kind.inits)}; '{self.init}' goes with {', '.join(goes)}"
            )
        if init.of_base and len(set(self.ranks or ())) > 1:
            raise ValueError(
                f"adapter.init = '{self.init}' takes ranks out of the base, which the clients with fewer of "
                f"adapter.ranks = {','.join(map(str, self.ranks or ()))} would miss; use another adapter.init"
            )
        if self.dropout and kind.dropout is None:
            raise ValueError(
                f"adapter.dropout = {self.dropout} is not for adapter.kind = '{self.kind}', which can drop no inputs; "
                "leave it at 0"
            )
        return self

    @model_validator(mode="after")
    def _begins_one_way(self) -> Self:
        if self.start is None:
            if self.start_sha256 is not None:
                raise ValueError("adapter.start_sha256 belongs to adapter.start; drop it")
            return self
        if self.init != "default":
            raise ValueError(
                f"adapter.start and adapter.init = '{self.init}' exclude each other: either says how the run begins"
            )
        if self.facts.update != "product":
            able = sorted(name for name, other in KINDS.all().items() if other.update == "product")
            raise ValueError(
                f"adapter.start is not for adapter.kind = '{self.kind}': only an update s B A can be begun with. "
                f"Allowed: {', '.join(able)}"
            )
        if len(set(self.ranks or ())) > 1:
            raise ValueError(
                "adapter.start and adapter.ranks exclude each other: clients of smaller ranks would begin with a part "
                "of the adapter; drop adapter.ranks"
            )
        return self

    @model_validator(mode="after")
    def _rows_go_with_the_start(self) -> Self:
        init = self.beginning
        if init.from_data and self.init_data is None:
            what = f"adapter.init = '{self.init}'"
            if init.begins:
                what = f"adapter.kind = '{self.kind}' begins {init.begins} (adapter.init = '{self.init}'), and"
            without = f"; without such rows use {init.instead}" if init.instead else ""
            raise ValueError(
                f"{what} needs adapter.init_data: a file or folder of public rows with the run's columns{without}"
            )
        if not init.from_data and self.init_data is not None:
            able = sorted(name for name, other in INITS.all().items() if other.from_data)
            raise ValueError(
                f"adapter.init_data = '{self.init_data}' belongs to adapter.init = "
                f"{' or '.join(map(repr, able))}, not to '{self.init}'; drop it"
            )
        return self

    def check_quantised(self, method: str) -> None:
        """Raise ConfigError where this adapter cannot be trained on a base held in fewer bits.

        Parameters
        ----------
        method : str
            How it is held, for the error.
        """
        kind, init = self.facts, self.beginning
        if not kind.quantised:
            able = ", ".join(sorted(name for name, each in KINDS.all().items() if each.quantised))
            raise ConfigError(
                f"adapter.kind = '{self.kind}' cannot be trained on a quantised base ({method}), whose weights are no "
                f"plain matrices. Allowed with it: {able}."
            )
        if init.of_base or init.of_gradients:
            able = ", ".join(name for name in kind.inits if not INITS.find(name).of_base)
            why = "takes a part out of the base" if init.of_base else "asks for gradients of the base's weights"
            raise ConfigError(
                f"adapter.init = '{init.name}' {why}, and a quantised one ({method}) has no digits for that. "
                + (f"Allowed with it: {able}." if not init.kind else f"Give a base that is not, or {init.instead}.")
            )

    @model_serializer(mode="wrap")
    def _without_what_the_kind_has_not(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name not in self.facts.lacks}

    @property
    def facts(self) -> Kind:
        """What is known of the kind."""
        return KINDS.find(self.kind)

    @property
    def beginning(self) -> Init:
        """What is known of the initialisation."""
        return INITS.find(self.init)

    @property
    def options(self) -> dict[str, Option]:
        """PEFT's own options of the kind, by PEFT's names."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def scaling(self) -> float:
        """What the update is multiplied with."""
        return self.scaling_of(self.rank)

    def scaling_of(self, rank: int) -> float:
        """Return the scaling of a client of some rank, such as alpha / rank."""
        return self.facts.scaled(self.alpha, rank)
