"""What must hold of a run before its privacy can be spoken of: leaks around the mechanism are refused by name."""

from __future__ import annotations

from fedpeft.config import RunConfig
from fedpeft.config.privacy import Rng
from fedpeft.errors import ConfigError
from fedpeft.privacy.levels import level_of


def with_rng(config: RunConfig, default: Rng) -> RunConfig:
    """Spell out where a private run's randomness comes from."""
    privacy = config.privacy
    if not privacy.is_private or privacy.rng is not None:
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
    if not privacy.is_private:
        return
    if adapter.beginning.from_data and not privacy.public_init_data:
        raise ConfigError(
            f"adapter.init = '{adapter.init}' looks at adapter.init_data, which no noise covers. If those rows are "
            "public, say so: privacy.public_init_data=true; else take another adapter.init."
        )
    if config.run.evaluate_clients and not privacy.release_metrics:
        raise ConfigError(
            "run.evaluate_clients = true weighs scores by each client's own labels or rows, which no noise covers; "
            "leave it off under privacy (privacy.release_metrics=true allows it, and voids the guarantee)."
        )
    level_of(privacy).check(config)
