"""What ``[run]`` may ask of a run's end, checked: by which score it stops, and how much it may move."""

from __future__ import annotations

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, nearest
from fedpeft.privacy.levels import level_of
from fedpeft.resident import Resident
from fedpeft.strategies.registry import find
from fedpeft.strategies.rounds.ending import MEGABYTE
from fedpeft.strategies.volume import cohort_of, volume
from fedpeft.tasks.metrics import METRICS


def monitored(config: RunConfig) -> str:
    """Return the metric that the run is judged by as it goes on."""
    return config.run.monitor or tasks.of(config).main_metric


def best_metric(config: RunConfig) -> str | None:
    """Return the metric by which the best adapter is chosen; None where it is not asked for."""
    best = config.run.best
    if isinstance(best, str):
        return best
    return monitored(config) if best else None


def check_ending(config: RunConfig, home: Resident) -> None:
    """Raise ConfigError if the run cannot end as it is asked to.

    Parameters
    ----------
    config : RunConfig
        With typed options.
    home : Resident
        Its adapter and clients.
    """
    run, private = config.run, config.privacy.is_private
    known = {"loss", *tasks.of(config).metrics} | {
        name for name, metric in METRICS.all().items() if tasks.named(config) in metric.adds_to
    }
    for key, metric in (("monitor", run.monitor), ("best", run.best)):
        if isinstance(metric, str) and metric not in known:
            raise ConfigError(f"run.{key} = '{metric}' is no metric of this task. {nearest(metric, known)}")
    if run.monitor is not None and run.patience is None and run.best is not True:
        raise ConfigError(
            f"run.monitor = '{run.monitor}' says by what a run is judged: give run.patience or run.best = true"
        )
    if run.best and find(config.strategy.name).capabilities.personal:
        raise ConfigError(
            f"run.best: strategy '{config.strategy.name}' leaves each client a part of its own, which goes on after "
            "the best round, so that there is no one best adapter to write; leave run.best unset"
        )
    if run.patience is not None and private:
        raise ConfigError(
            f"run.patience = {run.patience} is not for privacy.level = '{config.privacy.level}': when the run ends "
            "would depend on what came of the rows, and what is spent is stated for rounds that are fixed before. Set "
            "federation.rounds, and run.best for the best adapter among them"
        )
    if run.max_megabytes is not None:
        _check_budget(config, home, run.max_megabytes)


def _check_budget(config: RunConfig, home: Resident, megabytes: float) -> None:
    if level_of(config.privacy).hides_cohort:
        raise ConfigError(
            f"run.max_megabytes = {megabytes:g} counts messages, whose number is what privacy.level = "
            f"'{config.privacy.level}' keeps secret; set federation.rounds instead"
        )
    first = cohort_of(config, home) * sum(volume(config, home, 1))
    if first > megabytes * MEGABYTE:
        raise ConfigError(
            f"run.max_megabytes = {megabytes:g} does not pay for one round, which moves {first / MEGABYTE:.4g} "
            "megabytes. Raise it, or lower federation.fraction or adapter.rank"
        )


def affordable(config: RunConfig, home: Resident) -> int | None:
    """Return how many of the run's rounds its budget pays for, by plan; None where it has none."""
    if config.run.max_megabytes is None:
        return None
    left, cohort = config.run.max_megabytes * MEGABYTE, cohort_of(config, home)
    for number in range(1, config.federation.rounds + 1):
        left -= cohort * sum(volume(config, home, number))
        if left < 0:
            return number - 1
    return config.federation.rounds
