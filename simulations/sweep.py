"""Utility against epsilon: a comparison whose rows are every adapter with every strategy at every budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeft.config import Layer, RunConfig, merge
from fedpeft.config.privacy import ANY_LEVEL, PrivacyConfig
from fedpeft.errors import ConfigError
from fedpeft.jsons import strict_json, to_json
from fedpeft.privacy.statement import read_statement
from fedpeft.report.sweep import sweep_markdown, sweep_plot
from fedpeft.resident import resident
from fedpeft.rounding import as_given
from fedpeft.simulations.compare import read_row, refuse_options, write_files
from fedpeft.simulations.jobs import Job, Row, plan_jobs
from fedpeft.simulations.judging import Facts, sweep
from fedpeft.simulations.plan import plan_privacy
from fedpeft.simulations.running import Compared

# what a sweep itself sets, and where from
VARIED = {
    "privacy.level": "--level",
    "privacy.epsilon": "--epsilons",
    "privacy.delta": "--delta",
    "strategy.name": "--strategies",
    "adapter.kind": "--adapters",
}


@dataclass(frozen=True)
class Point(Row):
    """One adapter with one strategy at one budget.

    Parameters
    ----------
    label, method, settings, sections
        See `Row`.
    adapter : str, optional
        Kind of adapter; that of the configuration, or of the method, if not given.
    strategy : str
        As it was asked for.
    budget : float
        Epsilon; infinity trains without privacy.
    """

    adapter: str | None = None
    strategy: str = ""
    budget: float = math.inf


def split_epsilons(text: str) -> list[float]:
    """Read ``1,3,inf``.

    Raises
    ------
    ConfigError
        What is no positive number, is named twice, or infinity alone.
    """
    budgets: list[float] = []
    for word in _split(text, "--epsilons"):
        try:
            budget = float(word)
        except ValueError:
            budget = math.nan
        if not budget > 0:
            raise ConfigError(f"'{word}' in --epsilons is no epsilon; give positive numbers, or inf, such as 1,3,inf.")
        budgets.append(budget)
    if twice := [budget for budget in budgets if budgets.count(budget) > 1]:
        raise ConfigError(f"epsilon {as_given(twice[0])} is in --epsilons twice; name it once.")
    if budgets == [math.inf]:
        raise ConfigError("--epsilons inf trains without privacy alone; add a budget, or use `fedpeft compare`.")
    return budgets


def split_strategies(text: str) -> list[str]:
    """Read ``fedit,lora-fair:solver=cosine,regularization=0.5``: an option without a name is of the name before it."""
    words: list[str] = []
    for part in _split(text, "--strategies"):
        if words and "=" in part and ":" not in part.partition("=")[0]:
            words[-1] += f",{part}"
        else:
            words.append(part)
    return words


def split_adapters(text: str) -> list[str]:
    """Read ``lora,ffa-lora``."""
    return _split(text, "--adapters")


def _split(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{option} names nothing; separate what it names by commas.")
    return words


def private_words(
    words: Sequence[str], epsilons: Sequence[float], level: str | None = None, delta: float | None = None
) -> list[str]:
    """Add a sweep's own settings to the words of its configuration.

    Raises
    ------
    ConfigError
        Words that say themselves what the sweep sets, or that are options of one method.
    """
    for word in words:
        key = word.partition("=")[0].strip()
        if key in VARIED:
            raise ConfigError(f"'{word}': in a sweep, that is {VARIED[key]}; use it, and drop the word.")
        if key == "privacy.noise_multiplier":
            raise ConfigError(f"'{word}' fixes the noise, which a sweep calibrates to each epsilon. Drop it.")
    refuse_options(words)
    shared = [f"privacy.level={level or 'record'}", f"privacy.epsilon={min(epsilons)}"]
    return [*words, *shared, *([] if delta is None else [f"privacy.delta={delta}"])]


def sweep_points(
    adapters: Sequence[str | None], strategies: Sequence[str], epsilons: Sequence[float], privacy: PrivacyConfig
) -> list[Point]:
    """Return every combination, those of one base model next to each other, so that it need not be loaded again.

    Parameters
    ----------
    adapters : sequence of str or None
        Kinds; None leaves it to configuration and method.
    strategies : sequence of str
        Each as a method of `fedpeft.simulations.compare.split_words`.
    epsilons : sequence of float
        Budgets.
    privacy : PrivacyConfig
        What all private runs share.
    """
    rows = [read_row(word) for word in strategies]
    shared = privacy.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    open_run = {key: value for key, value in shared.items() if key in ANY_LEVEL} | {"level": "none"}
    for row in rows:
        if "privacy" in row.settings or (adapters != [None] and "kind" in row.settings.get("adapter", {})):
            raise ConfigError(f"'{row.label}' sets itself what a sweep sets for all; name options of the method only.")
    points = []
    for adapter in adapters:
        kind: Layer = {} if adapter is None else {"adapter": {"kind": adapter}}
        for budgets in ([math.inf], [budget for budget in epsilons if budget < math.inf]):
            for row in rows:
                for budget in budgets:
                    if budget not in epsilons:
                        continue
                    section = open_run if budget == math.inf else shared | {"epsilon": budget}
                    points.append(
                        Point(
                            label="_".join(filter(None, (adapter, row.label, f"epsilon={as_given(budget)}"))),
                            method=row.method,
                            settings=merge([row.settings, kind, {"privacy": section}]),
                            sections=frozenset({"privacy"}),
                            adapter=adapter,
                            strategy=row.label,
                            budget=budget,
                        )
                    )
    if twice := [point.label for point in points if [other.label for other in points].count(point.label) > 1]:
        raise ConfigError(f"'{twice[0]}' is to be run twice; name each adapter and strategy once.")
    return points


def plan_sweep(points: Sequence[Point], config: RunConfig, seeds: int, out: Path) -> list[Job]:
    """Resolve and check every run before anything runs, down to the noise that each budget asks for.

    Raises
    ------
    ConfigError
        A combination that is refused.
    PrivacyError
        A budget that no noise meets.
    RunDirectoryError
        A folder that holds something else already.
    """
    if config.privacy.noise_multiplier is not None:
        raise ConfigError(
            f"privacy.noise_multiplier = {config.privacy.noise_multiplier:g} fixes the noise, which a sweep calibrates "
            "to each epsilon. Drop it."
        )
    jobs = plan_jobs(points, config, seeds, out)
    checked = set()
    for job in jobs:
        run = job.config
        # noise is a matter of rows and steps alone, and not of the model
        mechanism = (run.privacy, run.train, run.federation, run.partition)
        if run.privacy.is_private and job.seed == jobs[0].seed and mechanism not in checked:
            checked.add(mechanism)
            plan_privacy(run, resident(run))
    return jobs


def write_sweep(jobs: Sequence[Job], compared: Compared, out: Path) -> Facts:
    """Summarise what is complete, and write it as sweep.json, sweep.md and sweep.png.

    Raises
    ------
    RunDirectoryError
        The files cannot be written.
    """
    points = {job.label: job.row for job in jobs}
    asked = [
        {
            "label": point.label,
            "adapter": point.adapter,
            "strategy": point.strategy,
            "budget": point.budget if math.isfinite(point.budget) else None,
        }
        for point in points.values()
        if isinstance(point, Point)
    ]
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    read = (read_statement(Path(run["path"])) for run in compared.runs)
    statements = [statement for statement in read if statement is not None]
    facts = sweep(asked, seeds, jobs[0].config.federation.rounds, compared.runs, statements)
    facts = dict(strict_json(facts | {"failed": compared.failed}))
    files = {
        "sweep.json": (to_json(facts, indent=2) + "\n").encode(),
        "sweep.md": sweep_markdown(facts).encode(),
    }
    if (png := sweep_plot(facts)) is not None:
        files["sweep.png"] = png
    write_files(out, files)
    return facts
