"""Several methods on the same clients, rows and seeds: one run each, through `simulate`, and the facts of all.

Two rows are bounds rather than methods. `local` never sends anything. `centralized` has all rows in one place.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.config import Layer, RunConfig, cohort_size, nest, resolve
from fedpeft.errors import ConfigError, FedpeftError, RunDirectoryError, nearest
from fedpeft.formats import duration, finite, number
from fedpeft.jsons import strict_json, to_json
from fedpeft.privacy.statement import read_statement
from fedpeft.report.comparison import BOUNDS, comparison, comparison_markdown
from fedpeft.report.privacy import epsilon
from fedpeft.resident import Resident, resident
from fedpeft.runs import CONFIG_FILE, check_vacant, read_config
from fedpeft.runs.history import ERRORS, History, domain_scores, main_metric, worst
from fedpeft.simulations.simulate import ray_grid, simulate
from fedpeft.strategies import available, with_typed_options

CENTRALIZED = "centralized"
Facts = dict[str, Any]


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
    own : frozenset of str
        Sections of which the row says everything itself, and the common configuration nothing.
    """

    label: str
    method: str
    settings: Layer = field(default_factory=dict)
    own: frozenset[str] = frozenset()


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
    """Tell whether two configurations are of one run; the number of workers changes no result."""
    workers = {"workers": other.simulation.workers}
    alike = one.model_copy(update={"simulation": one.simulation.model_copy(update=workers)})
    return alike.to_flat() == other.to_flat()


def split_words(words: Iterable[str]) -> tuple[list[Row], list[str]]:
    """Tell methods from configuration.

    A word that ends in ``.toml``, or holds ``=`` and no ``:`` before it, is configuration; every other word is a
    method, or ``NAME:option=value[,option=value]``, where an option with a dot is any setting, as in
    ``fedit:adapter.kind=ffa-lora``.

    Raises
    ------
    ConfigError
        No method, one that does not exist, or one that is named twice.
    """
    rows: list[Row] = []
    rest: list[str] = []
    for word in words:
        if word.endswith(".toml") or ("=" in word and ":" not in word.partition("=")[0]):
            rest.append(word)
        else:
            rows.append(read_row(word))
    refuse_options(rest)
    if not rows:
        raise ConfigError("no method to compare; name some, as in: fedpeft compare centralized local fedit lora-fair")
    labels = [row.label for row in rows]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"'{twice[0]}' is to be compared twice; name it once.")
    return rows, rest


def refuse_options(words: Iterable[str]) -> None:
    """Raise ConfigError if a word of what all rows share is an option of one method."""
    if options := [word for word in words if word.startswith("strategy.")]:
        key, _, value = options[0].removeprefix("strategy.").partition("=")
        raise ConfigError(f"'{options[0]}': options belong to one method; write NAME:{key}={value} for it.")


def read_row(word: str) -> Row:
    """Read ``NAME`` or ``NAME:option=value[,option=value]``; see `split_words`."""
    name, _, given = word.partition(":")
    known = [*available(), CENTRALIZED]
    if name not in known:
        raise ConfigError(f"unknown method '{name}'. {nearest(name, known)}")
    settings: dict[str, str] = {}
    for part in given.split(",") if given else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"'{part}' in '{word}' is not of the form option=value; write NAME:option=value,...")
        setting = key.strip() if "." in key else f"strategy.{key.strip()}"
        if setting.startswith("simulation.") or setting in ("run.seed", "federation.rounds"):
            raise ConfigError(f"'{setting}' in '{word}' is the same for all rows of a comparison; give it once, apart.")
        settings[setting] = value.strip()
    return Row(word, name, nest(settings))


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
            shared = {section: table for section, table in common.items() if section not in row.own}
            layers = [shared, _method_layer(row, config), row.settings]
            own = with_typed_options(_scoring_clients(resolve([*layers, {"run": {"seed": seed}}])))
            jobs.append(Job(row, seed, own, out / re.sub(r"[^\w.=,+-]", "_", row.label) / f"seed-{seed}"))
    for job in jobs:
        if not job.is_begun:
            check_vacant(job.path)
    return jobs


def _scoring_clients(config: RunConfig) -> RunConfig:
    """Also score each client's own rows, unless the user has decided it: never of private runs, where it is a leak."""
    if "evaluate_clients" in config.run.model_fields_set or config.privacy.level != "none":
        return config
    named = config.partition.by is not None and Resident(config).holds_out_test_rows  # so that test rows are named too
    can = config.task != "causal-lm" or config.data.domain is not None or named
    return config.model_copy(update={"run": config.run.model_copy(update={"evaluate_clients": can})})


def _method_layer(row: Row, config: RunConfig) -> Layer:
    """Return what a row's method itself says: for `centralized`, one client with the work of a whole cohort."""
    layer: Layer = {"strategy": {"name": row.method}}
    if row.method in BOUNDS and config.adapter.ranks is not None:
        layer["adapter"] = {"rank": config.adapter.rank}  # which is the largest
    if row.method != CENTRALIZED:
        return layer
    layer |= {
        "strategy": {"name": "fedit"},
        "partition": {"scheme": "iid"},
        "federation": {"clients": 1, "fraction": 1.0, "min_clients": 1},
    }
    if (steps := config.train.local_steps) is not None:
        federation = config.federation
        clients = federation.clients or len(resident(config).partition.client_ids)
        cohort = cohort_size(clients, federation.fraction, federation.min_clients)
        layer["train"] = {"local_steps": steps * cohort}
    return layer


@dataclass
class Compared:
    """What a comparison gave.

    Parameters
    ----------
    runs : list of dict
        Facts of each run that is complete.
    failed : dict of str to str
        Why the others stopped, by folder.
    interrupted : bool
        Whether the user stopped it.
    """

    runs: list[Facts] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_jobs(
    jobs: Sequence[Job], config: RunConfig, *, tell: Callable[[str], None] = print, verbose: bool = False
) -> Compared:
    """Run what is not done yet; an interrupted comparison that is asked for again goes on where it was.

    Parameters
    ----------
    jobs : sequence of Job
        See `plan_jobs`.
    config : RunConfig
        What they have in common; names the workers, which all runs share.
    tell : callable
        Is told of each run in one line.
    verbose : bool
        Let the libraries below speak.
    """
    compared = Compared()
    undone = sum(not job.is_done for job in jobs)
    started, done = time.monotonic(), 0
    with (ray_grid(config, verbose=verbose) if undone else None) or nullcontext() as grid:
        for index, job in enumerate(jobs, 1):
            name = f"run {index}/{len(jobs)}  {job.label}  seed {job.seed}"
            if job.is_done:
                compared.runs.append(run_facts(job))
                tell(f"{name}  {_score(compared.runs[-1])}  done before")
                continue
            begun = time.monotonic()
            try:
                if job.is_begun:  # and was interrupted
                    shutil.rmtree(job.path)
                outcome = simulate(job.config, job.path, verbose=verbose, grid=grid)
            except KeyboardInterrupt:
                compared.interrupted = True
                break
            except FedpeftError as error:  # of this row; the others may have cost hours
                compared.failed[str(job.path)] = str(error)
                tell(f"{name}  failed: {error}")
                continue
            if outcome.reason == "interrupted":
                compared.interrupted = True
                break
            done += 1
            now = time.monotonic()
            left = f"  ETA {duration((now - started) / done * (undone - done))}" if undone > done else ""
            if outcome.reason == "completed":
                compared.runs.append(run_facts(job))
                tell(f"{name}  {_score(compared.runs[-1])}  {duration(now - begun)}{left}")
            else:
                compared.failed[str(job.path)] = outcome.reason
                tell(f"{name}  failed: {outcome.error or outcome.reason}{left}")
    return compared


def _score(facts: Facts) -> str:
    score = f"{facts['metric']} {number(facts['score'])}"
    return score if facts["epsilon"] is None else f"{score}  epsilon {epsilon(facts['epsilon'])}"


def run_facts(job: Job) -> Facts:
    """Return what a comparison shows of one run."""
    history = History.read(job.path)
    metric = main_metric(job.config.task)
    domains = domain_scores(history.last, metric)
    federated = job.row.method != CENTRALIZED  # else what moved and merged says nothing
    statement = read_statement(job.path) or {}
    clients = (history.last or {}).get("clients")
    own_rows = clients.get(metric) if isinstance(clients, Mapping) and federated else None
    return {
        "label": job.label,
        "seed": job.seed,
        "path": str(job.path),
        "metric": metric,
        "score": finite((history.last or {}).get(metric)),
        "own_rows": finite(own_rows.get("mean")) if isinstance(own_rows, Mapping) else None,
        "worst_domain": domains[worst(domains, metric)] if domains else None,
        **{key: finite(history.rounds.get(history.done, {}).get(key)) if federated else None for key in ERRORS},
        "bytes": history.bytes_up + history.bytes_down if federated and history.is_counted else None,
        "seconds": history.seconds if history.is_counted else None,
        "epsilon": finite(statement.get("epsilon_max")),
    }


def default_folder(what: str = "compare") -> Path:
    """Return ``runs/compare-TIME``, or another word than compare."""
    return Path("runs") / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_comparison(jobs: Sequence[Job], compared: Compared, out: Path) -> Facts:
    """Summarise what is complete, and write it as comparison.json and comparison.md.

    Raises
    ------
    RunDirectoryError
        The files cannot be written.
    """
    labels, seeds = (list(dict.fromkeys(getattr(job, key) for job in jobs)) for key in ("label", "seed"))
    facts = comparison(labels, seeds, jobs[0].config.federation.rounds, compared.runs)
    facts = dict(strict_json(facts | {"failed": compared.failed}))
    write_files(
        out,
        {
            "comparison.json": (to_json(facts, indent=2) + "\n").encode(),
            "comparison.md": comparison_markdown(facts).encode(),
        },
    )
    return facts


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the summaries of several runs beside their directories.

    Raises
    ------
    RunDirectoryError
        The files cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (out / name).write_bytes(data)
    except OSError as error:
        names = ", ".join(files)
        raise RunDirectoryError(f"cannot write {names} into '{out}': {error.strerror or error}") from None
