"""What there is: clients and their rows, methods, libraries, runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Asked, Json, Verbose, quiet, show, spread
from fedpeft.errors import ConfigError


@spread(without={"strategy", "adapter", "rounds", "workers"})
def partition(
    asked: Asked,
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show who holds what."""
    config = asked.config()
    quiet(verbose)
    from fedpeft.data.partition import partition_table
    from fedpeft.report.holdings import partition_view
    from fedpeft.resident import resident

    home = resident(config)
    table = partition_table(home.partition, home.data.train, home.data.labels)
    for note in home.data.notes:
        print(f"note: {note}", file=sys.stderr)
    for caution in home.data.cautions:
        print(f"warning: {caution}", file=sys.stderr)
    show(table, partition_view, json_lines)
    if plot is not None:
        from fedpeft.report.plots import plot_partition

        try:
            plot_partition(plot, home.partition, home.data.train, home.data.labels)
        except OSError as error:
            raise ConfigError(f"cannot write '{plot}': {error.strerror or error}") from None


def strategies(json_lines: Json = False) -> None:
    """List the server's methods and their options."""
    quiet(False)
    from fedpeft.report.tables import strategies_table
    from fedpeft.strategies import available
    from fedpeft.strategies.catalogue import catalogue

    show(catalogue(available()), strategies_table, json_lines)


def env(json_lines: Json = False) -> None:
    """Show what is installed, for bug reports."""
    quiet(False)
    from fedpeft.report.tables import environment_table
    from fedpeft.runs import environment

    facts = environment()
    show(facts, environment_table, json_lines)


def runs(
    folder: Annotated[Path, typer.Argument(help="Where run directories are.")] = Path("runs"), json_lines: Json = False
) -> None:
    """List runs."""
    from fedpeft.report.runs import runs_table
    from fedpeft.runs.listing import list_runs

    show(list_runs(folder), lambda runs: runs_table(runs, folder), json_lines)
