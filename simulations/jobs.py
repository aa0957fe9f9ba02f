"""The runs of a comparison: what each is to do and where, all checked before any begins.

Some rows are bounds rather than methods: `centralized` has all rows in one place, and a method's record says whether it
is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedpeft import tasks
from fedpeft.config import Layer, RunConfig, cohort_size, resolve
from fedpeft.config.federation import MACHINE_KEYS
from fedpeft.errors import ConfigError, RunDirectoryError
from fedpeft.resident import Resident, resident
from fedpeft.runs import CONFIG_FILE, check_vacant, read_config
from fedpeft.runs.history import History
from fedpeft.strategies import FedIt, available, with_typed_options

CENTRALIZED = "centralized"


def bounds() -> dict[str, str]:
    """Return what a comparison says of each row that is a bound, by its name."""
    of_all_rows = (
        f"{CENTRALIZED}, the upper bound, is no federation: one client holds all rows, and makes as many steps "
        "a round as the clients of a round together (or as many epochs as each)."
    )
    of_methods = {name: method.capabilities.bound for name, method in available().items()}
    return {CENTRALIZED: of_all_rows} | {name: f"{name}, {bound}" for name, bound in of_methods.items() if bound}


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a method, or a bound, with options of its own.

    Parameters
    ----------
    label : str
        As it was asked for, such as ``fedit:server_optimizer=adam``.
    method : str
        Name of a strategy, or ``centralized``.
    settings : Layer
        What is laid over the common configuration.
    sections : frozenset of str
        Sections of which the row says everything itself, and the common configuration nothing.
    """

    label: str
    method: str
    settings: Layer = field(default_factory=dict)
    sections: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    row: Row
    seed: int
    config: RunConfig
    path: Path

    @property
    def label(self) -> str:
        """Its row's."""
        return self.row.label

    @property
    def is_done(self) -> bool:
        """Whether this very run is there and complete."""
        return self.is_begun and History.read(self.path).state == "completed"

    @property
    def is_begun(self) -> bool:
        """Whether this very run is there, complete or not."""
        return (self.path / CONFIG_FILE).is_file() and _same(read_config(self.path), self.config)


def _same(one: RunConfig, other: RunConfig) -> bool:
    """Tell whether a run's configuration is what is asked for; neither machine nor checkpoints change a result.

    What was left open, ``auto``, is fixed in the run's own.
    """
    asked = other.simulation.model_dump()
    free = {key: value for key, value in asked.items() if key in MACHINE_KEYS or value == "auto"}
    kept = {"checkpoint_every": other.run.checkpoint_every, "keep_checkpoints": other.run.keep_checkpoints}
    simulation, run = one.simulation.model_copy(update=free), one.run.model_copy(update=kept)
    return one.model_copy(update={"simulation": simulation, "run": run}).to_flat() == other.to_flat()


def plan_jobs(rows: Sequence[Row], config: RunConfig, seeds: int, out: Path) -> list[Job]:
    """Resolve the configuration of every run, and check all of them and where they go, before anything runs.

    Seeds come first, so that model and rows are prepared once a seed.

    Raises
    ------
    ConfigError
        Options that a method does not have.
    RunDirectoryError
        A folder that holds something else already.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} must be at least 1.")
    if (out / CONFIG_FILE).exists():
        raise RunDirectoryError(f"'{out}' is a run; give another --out, for a folder of runs.")
    # what nobody has set is left open: a method may be defined with another kind of adapter. The strategy's options are
    # its own, and of no other row
    common = config.model_dump(exclude_none=True, exclude_unset=True) | {"strategy": config.strategy.model_dump()}
    jobs = []
    for seed in range(config.run.seed, config.run.seed + seeds):
        for row in rows:
            shared = {section: table for section, table in common.items() if section not in row.sections}
            layers = [shared, _method_layer(row, config), row.settings]
            resolved = with_typed_options(_scoring_clients(resolve([*layers, {"run": {"seed": seed}}])))
            jobs.append(Job(row, seed, resolved, out / re.sub(r"[^\w.=,+-]", "_", row.label) / f"seed-{seed}"))
    for job in jobs:
        if not job.is_begun:
            check_vacant(job.path)
    return jobs


def _scoring_clients(config: RunConfig) -> RunConfig:
    """Also score each client's own rows, unless the user has decided it: never of private runs, where it is a leak."""
    if "evaluate_clients" in config.run.model_fields_set or config.privacy.is_private:
        return config
    named = config.partition.by is not None and Resident(config).holds_out_test_rows  # so that test rows are named too
    can = tasks.of(config).has_labels or config.data.domain is not None or named
    return config.model_copy(update={"run": config.run.model_copy(update={"evaluate_clients": can})})


def _method_layer(row: Row, config: RunConfig) -> Layer:
    """Return what a row's method itself says: for `centralized`, one client with the work of a whole cohort."""
    layer: Layer = {"strategy": {"name": row.method}}
    if row.method in bounds() and config.adapter.ranks is not None:
        layer["adapter"] = {"rank": config.adapter.rank}  # which is the largest
    if row.method != CENTRALIZED:
        return layer
    layer |= {
        "strategy": {"name": FedIt.name},
        "partition": {"scheme": "iid"},
        "federation": {"clients": 1, "fraction": 1.0, "min_clients": 1},
    }
    if (steps := config.train.local_steps) is not None:
        federation = config.federation
        clients = federation.clients or len(resident(config).partition.client_ids)
        cohort = cohort_size(clients, federation.fraction, federation.min_clients)
        layer["train"] = {"local_steps": steps * cohort}
    return layer
