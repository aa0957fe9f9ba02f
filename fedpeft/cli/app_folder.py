"""What ``fedpeft deploy init`` checks before it writes an app folder, and what it says to type next."""

from __future__ import annotations

from pathlib import Path

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.deployment import check_empty, refuse_canaries, write_app
from fedpeft.errors import DeploymentError
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.statement import void
from fedpeft.resident import resident
from fedpeft.rounding import as_given
from fedpeft.runs import default_directory
from fedpeft.strategies import find, with_typed_options


def init_app(directory: Path, config: RunConfig, out: Path | None) -> str:
    """Write a run's app folder, and say what to type next.

    Parameters
    ----------
    directory : Path
        The folder to write; must not hold anything.
    config : RunConfig
        The run, with rows to read the label names from, or with `data.labels` and `federation.clients`.
    out : Path, optional
        The run directory on the SuperLink's machine; ``runs/<name>`` under the current folder if not given.

    Raises
    ------
    FedpeftError
        The folder is not empty, a strategy or option does not exist, or labels or clients cannot be read off the rows.
    """
    check_empty(directory)
    if why := config.adapter.beginning.simulations_only:
        raise DeploymentError(f"adapter.init = '{config.adapter.init}' works in simulations only: {why}")
    if config.adapter.start is not None and (config.adapter.facts.fixed or config.adapter.head == "frozen"):
        raise DeploymentError(
            "adapter.start with an A or a head that nobody trains works in simulations only: sites draw those from the "
            "run's seed. Use adapter.kind = 'lora' and a shared head."
        )
    refuse_canaries(config)
    config = with_typed_options(config, rng="secure")
    if personal := find(config.strategy.name).capabilities.personal:
        raise DeploymentError(
            f"strategy '{config.strategy.name}' leaves {', '.join(sorted(personal))} with the clients and works in "
            "simulations only: a SuperNode would lose it with each restart."
        )
    if config.adapter.head == "local":
        raise DeploymentError(
            "adapter.head = 'local' works in simulations only: a SuperNode would lose its head with each restart. "
            "Use 'shared' or 'frozen'."
        )
    named = not tasks.of(config).has_labels or config.data.label_names is not None
    home = resident(config)
    clients = config.federation.clients or len(home.partition.client_ids)
    path = write_app(directory, config, out or default_directory(config), None if named else tuple(home.data.labels))
    rows = "'data=\"/path/to/its/rows\"'"
    share = f"'partition-id=I num-partitions={clients}' (I = 0 .. {clients - 1}), or "
    return (
        f"wrote {path}\n"
        f"start a SuperLink and {clients} SuperNodes, then: flwr run {directory} CONNECTION\n"
        f"CONNECTION is the SuperLink's name in Flower's config.toml; each SuperNode gets --node-config "
        f"{share if config.data.source is not None else ''}{rows}{_of_privacy(config)}"
    )


def _of_privacy(config: RunConfig) -> str:
    """Say what a private app promises and what a site may hold it to; warn of what voids it."""
    privacy = config.privacy
    if not privacy.is_private:
        return ""
    asked = (
        f"noise multiplier {privacy.noise_multiplier:g}"
        if privacy.epsilon is None
        else f"epsilon {as_given(privacy.epsilon)}"
    )
    rounds = f"{config.federation.rounds} round" + "s" * (config.federation.rounds > 1)
    lines = [f"privacy: {privacy.level} level, {asked} over {rounds}, randomness {privacy.rng}"]
    lines += level_of(privacy).deployed(privacy)
    reasons = void(privacy)
    if privacy.rng == "seeded":
        reasons.append("privacy.rng = 'seeded': noise can be replayed; drop it (a deployment's default is secure)")
    lines += [f"warning: no guarantee can be given: {reason}" for reason in reasons]
    return "\n" + "\n".join(lines)
