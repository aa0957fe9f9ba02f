"""What must hold of a run before its privacy can be spoken of: leaks around the mechanism are refused by name."""

from __future__ import annotations

from fedpeft.adapters.kinds import KINDS
from fedpeft.config import RunConfig
from fedpeft.config.privacy import Rng
from fedpeft.errors import ConfigError


def with_rng(config: RunConfig, default: Rng) -> RunConfig:
    """Spell out where a private run's randomness comes from."""
    privacy = config.privacy
    if privacy.level == "none" or privacy.rng is not None:
        return config
    return config.model_copy(update={"privacy": privacy.model_copy(update={"rng": default})})


def check_privacy(config: RunConfig) -> None:
    """Refuse what the mechanism would not cover, or could not do.

    Raises
    ------
    ConfigError
        Naming the setting, what is allowed and what to do.
    """
    privacy, adapter = config.privacy, config.adapter
    if privacy.level == "none":
        return
    if adapter.start.from_data and not privacy.public_init_data:
        raise ConfigError(
            f"adapter.init = '{adapter.init}' looks at adapter.init_data, which no noise covers. If those rows are "
            "public, say so: privacy.public_init_data=true; else take another adapter.init."
        )
    if config.run.evaluate_clients and not privacy.release_metrics:
        raise ConfigError(
            "run.evaluate_clients = true weighs scores by each client's own labels or rows, which no noise covers; "
            "leave it off under privacy (privacy.release_metrics=true allows it, and voids the guarantee)."
        )
    if privacy.level == "record":
        _check_record(config)


def _check_record(config: RunConfig) -> None:
    privacy, adapter, train = config.privacy, config.adapter, config.train
    if not adapter.facts.row_by_row:
        able = sorted(name for name, kind in KINDS.all().items() if kind.row_by_row)
        raise ConfigError(
            f"adapter.kind = '{adapter.kind}' is not for privacy.level = 'record': the gradient of each single row "
            f"cannot be had for what it trains. Allowed: {', '.join(able)}; or privacy.level=client."
        )
    if train.max_grad_norm:
        raise ConfigError(
            f"train.max_grad_norm = {train.max_grad_norm:g} clips whole gradients; under privacy.level = 'record' each "
            "row's is clipped: set privacy.max_grad_norm, and leave this at 0."
        )
    if privacy.public_counts:
        return
    if train.local_steps is None:
        raise ConfigError(
            "privacy.public_counts = false needs train.local_steps: the length of an epoch would tell how many rows a "
            "client has."
        )
