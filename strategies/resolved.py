"""A configuration checked against its method, with everything spelled out that follows from it."""

from __future__ import annotations

from pydantic import ValidationError

from fedpeft import tasks
from fedpeft.adapters.warm import followed
from fedpeft.config import AdapterConfig, RunConfig, StrategyConfig, TrainConfig, describe
from fedpeft.config.privacy import Rng
from fedpeft.errors import ConfigError
from fedpeft.privacy.checks import check_privacy, with_rng
from fedpeft.privacy.levels import level_of
from fedpeft.strategies.averaging.private_mean import require_sums
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.registry import available, find
from fedpeft.tasks.metrics import asked
from fedpeft.training.optimizers import OPTIMIZERS


def with_typed_options(config: RunConfig, *, rng: Rng = "seeded") -> RunConfig:
    """Check task, strategy and privacy, and return the configuration with every option spelled out.

    Parameters
    ----------
    config : RunConfig
        As asked for.
    rng : {"seeded", "secure"}
        What ``privacy.rng`` is where nobody says: a simulation's, unless given.
    """
    asked(config, tasks.of(config))
    config = config.model_copy(update={"adapter": followed(config.adapter)})
    method = find(config.strategy.name)
    parsed = method.parse_options(config.strategy.options)
    if "kind" in config.adapter.model_fields_set:  # before what goes with the kind
        _check_kind(config, method)
    config = _with_own_adapter(config, method)
    _check_kind(config, method)
    _check_ranks(config, method)
    method.check(parsed, config.adapter)
    config = _with_own_clipping(_with_own_optimizer(config, method))
    _check_quantised(config, method)
    if level_of(config.privacy).server_adds_noise:
        require_sums(method, parsed, config.adapter.ranks or (), able=available().values())
    check_privacy(config)
    config = with_rng(config, rng)
    options = parsed.model_dump(mode="json", exclude_none=True)
    return config.model_copy(update={"strategy": StrategyConfig(name=config.strategy.name, **options)})


def _check_kind(config: RunConfig, method: type[AdapterStrategy]) -> None:
    kind, kinds = config.adapter.kind, method.capabilities.kinds
    if not method.capabilities.takes(config.adapter.facts):
        able = ", ".join(name for name, other in available().items() if _takes(other, config.adapter))
        raise ConfigError(
            f"strategy '{method.name}' cannot merge adapters of adapter.kind = '{kind}'. "
            f"Allowed: {', '.join(sorted(kinds))}; or use a strategy for '{kind}': {able}."
        )


def _with_own_adapter(config: RunConfig, method: type[AdapterStrategy]) -> RunConfig:
    """Choose what a method is defined with, where nobody has asked for something else."""
    adapter, facts = config.adapter, method.capabilities
    implied: dict[str, str] = {} if adapter.head is not None else {"head": facts.head}
    kind = facts.kind or (min(facts.kinds) if len(facts.kinds) == 1 else "")
    if kind and "kind" not in adapter.model_fields_set:
        implied["kind"] = kind
    if facts.init and adapter.init != facts.init:
        if adapter.init != "default":
            raise ConfigError(
                f"adapter.init = '{adapter.init}': strategy '{method.name}' needs '{facts.init}'; leave it unset"
            )
        implied["init"] = facts.init
    if not implied:
        return config
    try:  # anew, since what was chosen before may not go with it
        adapter = AdapterConfig.model_validate({**adapter.model_dump(exclude_unset=True), **implied})
    except ValidationError as error:
        raise ConfigError(f"strategy '{method.name}': {describe(error, 'adapter')}") from None
    return config.model_copy(update={"adapter": adapter})


def _with_own_optimizer(config: RunConfig, method: type[AdapterStrategy]) -> RunConfig:
    """Choose an optimiser for a method that needs plain steps, where nobody has asked for another."""
    train = config.train
    if method.capabilities.plain_steps and train.lora_plus_ratio != 1:
        raise ConfigError(
            f"train.lora_plus_ratio = {train.lora_plus_ratio:g}: strategy '{method.name}' needs one learning rate for "
            "all that is trained; leave it at 1"
        )
    if not method.capabilities.plain_steps or OPTIMIZERS.find(train.optimizer).plain(train.options):
        return config
    able = [name for name, each in OPTIMIZERS.all().items() if each.plain(each.options())]
    if "optimizer" in train.model_fields_set:
        of_it = ", ".join(f"{key} {value}" for key, value in train.options.model_dump().items())
        raise ConfigError(
            f"train.optimizer = '{train.optimizer}'{f' ({of_it})' if of_it else ''}: strategy '{method.name}' needs "
            f"steps that are the learning rate times the gradient. Use {' or '.join(able)} without momentum, and "
            "choose train.learning_rate for it"
        )
    given = {key: getattr(train, key) for key in train.model_fields_set & type(train).model_fields.keys()}
    return config.model_copy(update={"train": TrainConfig.model_validate({**given, "optimizer": able[0]})})


def _with_own_clipping(config: RunConfig) -> RunConfig:
    """Choose the norm that whole gradients are clipped to by the task, where nobody says and no row's is clipped."""
    if config.train.max_grad_norm is not None:
        return config
    norm = 0.0 if level_of(config.privacy).clients_add_noise else tasks.of(config).max_grad_norm
    return config.model_copy(update={"train": config.train.model_copy(update={"max_grad_norm": norm})})


def _check_quantised(config: RunConfig, method: type[AdapterStrategy]) -> None:
    asked = config.model.quantization
    if asked is None:
        return
    if method.capabilities.changes_base:
        able = ", ".join(name for name, other in available().items() if _keeps_base(other, config.adapter))
        raise ConfigError(
            f"strategy '{method.name}' moves the base, and model.quantization = '{asked}' holds it in too few bits to "
            f"add small changes to. Leave model.quantization unset, or use a strategy that leaves the base as it is: "
            f"{able}."
        )
    config.adapter.check_quantised(asked)


def _keeps_base(method: type[AdapterStrategy], adapter: AdapterConfig) -> bool:
    return not method.capabilities.changes_base and _takes(method, adapter)


def _takes(method: type[AdapterStrategy], adapter: AdapterConfig) -> bool:
    if not method.capabilities.takes(adapter.facts):
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
    if not adapter.facts.mixed_ranks:
        raise ConfigError(
            f"adapter.ranks and adapter.kind = '{adapter.kind}' exclude each other: a frozen A has one rank"
        )
    if adapter.beginning.of_base:
        raise ConfigError(
            f"adapter.ranks and adapter.init = '{adapter.init}' exclude each other: it takes as many ranks out of the "
            "base as the adapter has, the same for all clients"
        )
