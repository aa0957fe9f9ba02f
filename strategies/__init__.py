"""Server side: one federated LoRA method a file, and the registry that finds them by name."""

from __future__ import annotations

from importlib.metadata import entry_points

from pydantic import ValidationError

from fedpeft.adapters.kinds import INITS_OF_BASE
from fedpeft.config import AdapterConfig, RunConfig, StrategyConfig, describe
from fedpeft.config.privacy import Rng
from fedpeft.errors import ConfigError, nearest
from fedpeft.privacy.checks import check_privacy, with_rng
from fedpeft.privacy.levels import level_of
from fedpeft.strategies.averaging.private_mean import require_sums
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import Capabilities
from fedpeft.strategies.fed_sb import FedSb
from fedpeft.strategies.fedex_lora import FedExLora
from fedpeft.strategies.fedit import FedIt
from fedpeft.strategies.fedrot_lora import FedRotLora
from fedpeft.strategies.fedsa_lora import FedSaLora
from fedpeft.strategies.fedsvd import FedSvd
from fedpeft.strategies.flexlora import FlexLora
from fedpeft.strategies.flora import FLora
from fedpeft.strategies.florist import Florist
from fedpeft.strategies.frlora import FrLora
from fedpeft.strategies.hetlora import HetLora
from fedpeft.strategies.local import Local
from fedpeft.strategies.lora_fair import LoraFair
from fedpeft.strategies.lora_lego import LoraLego
from fedpeft.strategies.raflora import RaFLora
from fedpeft.strategies.rolora import RoLora

__all__ = [
    "STRATEGIES",
    "AdapterStrategy",
    "Capabilities",
    "FLora",
    "FedExLora",
    "FedIt",
    "FedRotLora",
    "FedSaLora",
    "FedSb",
    "FedSvd",
    "FlexLora",
    "Florist",
    "FrLora",
    "HetLora",
    "Local",
    "LoraFair",
    "LoraLego",
    "RaFLora",
    "RoLora",
    "StrategyOptions",
    "available",
    "find",
    "with_typed_options",
]

STRATEGIES: dict[str, type[AdapterStrategy]] = {
    method.name: method
    for method in (
        FedIt,
        LoraFair,
        LoraLego,
        FLora,
        FedExLora,
        FlexLora,
        RaFLora,
        HetLora,
        Florist,
        RoLora,
        FedSaLora,
        FedSvd,
        FedSb,
        FrLora,
        FedRotLora,
        Local,
    )
}

ENTRY_POINTS = "fedpeft.strategies"


def available() -> dict[str, type[AdapterStrategy]]:
    """Return all methods by name: ours, and those that other packages add under the entry point group."""
    found = dict(STRATEGIES)
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name not in found:
            found[entry.name] = entry.load()
    return found


def find(name: str) -> type[AdapterStrategy]:
    """Return a method by its name.

    Raises
    ------
    ConfigError
        There is none of that name.
    """
    methods = available()
    if name not in methods:
        raise ConfigError(f"unknown strategy '{name}'. {nearest(name, methods)}")
    return methods[name]


def with_typed_options(config: RunConfig, *, rng: Rng = "seeded") -> RunConfig:
    """Check strategy and privacy, and return the configuration with every option spelled out.

    Parameters
    ----------
    config : RunConfig
        As asked for.
    rng : {"seeded", "secure"}
        What ``privacy.rng`` is where nobody says: a simulation's, unless given.
    """
    method = find(config.strategy.name)
    parsed = method.parse_options(config.strategy.options)
    if "kind" in config.adapter.model_fields_set:  # before what goes with the kind
        _check_kind(config, method)
    config = _with_own_adapter(config, method)
    _check_kind(config, method)
    _check_ranks(config, method)
    method.check(parsed, config.adapter)
    if level_of(config.privacy).server_adds_noise:
        require_sums(method, parsed, config.adapter.ranks or (), able=available().values())
    check_privacy(config)
    config = with_rng(config, rng)
    options = parsed.model_dump(mode="json", exclude_none=True)
    return config.model_copy(update={"strategy": StrategyConfig(name=config.strategy.name, **options)})


def _check_kind(config: RunConfig, method: type[AdapterStrategy]) -> None:
    kind, kinds = config.adapter.kind, method.capabilities.kinds
    if kind not in kinds:
        able = ", ".join(name for name, other in available().items() if _takes(other, config.adapter))
        raise ConfigError(
            f"strategy '{method.name}' cannot merge adapters of adapter.kind = '{kind}'. "
            f"Allowed: {', '.join(sorted(kinds))}; or use a strategy for '{kind}': {able}."
        )


def _with_own_adapter(config: RunConfig, method: type[AdapterStrategy]) -> RunConfig:
    """Choose what a method is defined with, where nobody has asked for something else."""
    adapter, facts = config.adapter, method.capabilities
    own: dict[str, str] = {} if adapter.head is not None else {"head": facts.head}
    kind = facts.kind or (min(facts.kinds) if len(facts.kinds) == 1 else "")
    if kind and "kind" not in adapter.model_fields_set:
        own["kind"] = kind
    if facts.init and adapter.init != facts.init:
        if adapter.init != "default":
            raise ConfigError(
                f"adapter.init = '{adapter.init}': strategy '{method.name}' needs '{facts.init}'; leave it unset"
            )
        own["init"] = facts.init
    if not own:
        return config
    try:  # anew, since what was chosen before may not go with it
        adapter = AdapterConfig.model_validate({**adapter.model_dump(exclude_unset=True), **own})
    except ValidationError as error:
        raise ConfigError(f"strategy '{method.name}': {describe(error, 'adapter')}") from None
    return config.model_copy(update={"adapter": adapter})


def _takes(method: type[AdapterStrategy], adapter: AdapterConfig) -> bool:
    if adapter.kind not in method.capabilities.kinds:
        return False
    try:
        method.check(method.Options(), adapter)
    except ConfigError:
        return False
    return True


def _check_ranks(config: RunConfig, method: type[AdapterStrategy]) -> None:
    adapter = config.adapter
    if adapter.ranks is None or len(set(adapter.ranks)) == 1:
        return
    if not method.capabilities.mixed_ranks:
        able = ", ".join(name for name, other in available().items() if other.capabilities.mixed_ranks)
        raise ConfigError(
            f"adapter.ranks = {','.join(map(str, adapter.ranks))}: strategy '{method.name}' merges adapters of one "
            f"rank only. Mixed ranks: {able}."
        )
    if adapter.kind == "ffa-lora":
        raise ConfigError("adapter.ranks and adapter.kind = 'ffa-lora' exclude each other: a frozen A has one rank")
    if adapter.init in INITS_OF_BASE:
        raise ConfigError(
            f"adapter.ranks and adapter.init = '{adapter.init}' exclude each other: it takes as many ranks out of the "
            "base as the adapter has, the same for all clients"
        )
