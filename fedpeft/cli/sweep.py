"""Utility against epsilon: ``fedpeft privacy sweep``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import PLAIN, Asked, Voice, end_of_runs, quiet, show, spread, tell
from fedpeft.cli.signals import stoppable
from fedpeft.errors import ConfigError


@dataclass(frozen=True)
class Protection:
    """What the runs are to keep, in words of the command line."""

    epsilons: Annotated[str, typer.Option(help="Budgets, commas between; inf trains without privacy.")] = "1,3,6,inf"
    level: Annotated[str, typer.Option(help="What is protected: record, or client.")] = "record"
    delta: Annotated[float | None, typer.Option(help="privacy.delta of all runs.")] = None


UNASKED = Protection()


@spread(without={"strategy", "adapter"})
def sweep(
    asked: Asked,
    protection: Protection = UNASKED,
    adapters: Annotated[
        str | None, typer.Option(help="Kinds of adapter, commas between; the configuration's if not given.")
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            help="Methods, commas between, NAME or NAME:option=value[,option=value]; the configuration's if not given."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds to run each with, from --seed on.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all runs, runs/sweep-TIME if not given; kept if done.")
    ] = None,
    voice: Voice = PLAIN,
) -> None:
    """Train every adapter with every strategy at every budget, and show utility against epsilon.

    The epsilon that is shown is what each run states that it spent, over all rounds. Noise is calibrated to each
    budget, and every combination is checked before anything runs.

    Writes OUT/COMBINATION/seed-N/, sweep.json, sweep.md and sweep.png; goes on with the same words and --out.
    """
    quiet(voice.verbose)
    level = protection.level
    from fedpeft.config.privacy import PRIVATE_LEVELS

    if level not in PRIVATE_LEVELS:
        raise ConfigError(
            f"--level {level} does not exist; give {' or '.join(PRIVATE_LEVELS)} (--epsilons inf is without privacy)."
        )
    from fedpeft.report.sweep import sweep_table
    from fedpeft.simulations.compare import default_folder
    from fedpeft.simulations.running import run_jobs
    from fedpeft.simulations.sweep import (
        plan_sweep,
        private_words,
        split_adapters,
        split_epsilons,
        split_strategies,
        sweep_points,
        write_sweep,
    )

    budgets = split_epsilons(protection.epsilons)
    config = asked.config(private_words(asked.words or (), budgets, level, protection.delta))
    kinds = [None] if adapters is None else split_adapters(adapters)
    methods = [config.strategy.name] if strategies is None else split_strategies(strategies)
    folder = out or default_folder("sweep")
    jobs = plan_sweep(sweep_points(kinds, methods, budgets, config.privacy), config, seeds, folder)
    with stoppable():
        swept = run_jobs(jobs, config, tell=tell, verbose=voice.verbose)
    facts = write_sweep(jobs, swept, folder)
    if swept.runs or voice.json_lines:
        show(facts, sweep_table, voice.json_lines)
    if not voice.json_lines:
        print(f"saved {folder}/sweep.md, sweep.json" + (" and sweep.png" if swept.runs else ""))
    end_of_runs(swept, len(jobs), folder, out)
