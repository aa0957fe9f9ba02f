"""Several methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Asked, Json, Verbose, end_of_runs, quiet, show, spread, tell
from fedpeft.cli.output import saved
from fedpeft.cli.signals import stoppable


@spread(without={"words", "strategy"})
def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="METHOD... [CONFIG.toml] [section.key=value ...]",
            help="Methods, each NAME or NAME:option=value[,option=value]; and what they share, as for simulate.",
        ),
    ],
    asked: Asked,
    seeds: Annotated[int, typer.Option(help="How many seeds to run each method with, from --seed on.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of all runs, runs/compare-TIME if not given; kept if done."),
    ] = None,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run several methods on the same clients, rows and seeds, and put them side by side.

    A METHOD is a name, or NAME:option=value[,option=value] with options of its own; an option with a dot is any
    setting, as in fedit:adapter.kind=ffa-lora. What all share is said as for simulate.

    Two bounds are methods here: `local`, where every client trains alone and nothing is sent, and `centralized`,
    where one client holds all rows and makes as many steps a round as all clients of a round together.

    Writes OUT/METHOD/seed-N/, comparison.json and comparison.md. With the same words and --out, an interrupted
    comparison goes on where it was, inside a run too: rounds that are done are not repeated.
    """
    quiet(verbose)
    from fedpeft.report.comparison import comparison_table
    from fedpeft.simulations.compare import default_folder, split_words, write_comparison
    from fedpeft.simulations.jobs import plan_jobs
    from fedpeft.simulations.running import run_jobs

    rows, rest = split_words(words)
    config = asked.config(rest)
    folder = out or default_folder()
    jobs = plan_jobs(rows, config, seeds, folder)
    with stoppable():
        compared = run_jobs(jobs, config, tell=tell, verbose=verbose)
    facts = write_comparison(jobs, compared, folder)
    saved(folder)
    if compared.runs or json_lines:
        show(facts, comparison_table, json_lines)
    if not json_lines:
        print(f"saved {folder}/comparison.md and comparison.json")
    end_of_runs(compared, len(jobs), folder, out)
