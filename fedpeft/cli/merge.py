"""Merging adapters that exist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.completion import complete_strategy
from fedpeft.cli.options import Json, quiet, show, spread
from fedpeft.cli.output import saved
from fedpeft.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """The method that merges, as the command line names it."""

    method: Annotated[
        str, typer.Option(help="How to merge; see `fedpeft strategies`.", autocompletion=complete_strategy)
    ]
    rank: Annotated[int | None, typer.Option(help="Rank of the result; the largest of the adapters' if not given.")] = (
        None
    )
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the method; may be repeated.")
    ] = None
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0

    def options(self) -> dict[str, str]:
        """Return the method's options by name."""
        pairs = [word.partition("=") for word in self.option or ()]
        for name, equals, _ in pairs:
            if not equals:
                raise ConfigError(f"--option '{name}' is not of the form key=value, such as reweight=paper.")
        return {name.strip().removeprefix("strategy."): value.strip() for name, _, value in pairs}


@spread()
def merge(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="PEFT's LoRA adapter folders.")],
    how: Method,
    out: Annotated[Path, typer.Option(help="The folder to write; must not hold anything.")],
    weights: Annotated[
        str | None, typer.Option(help="A positive number for each adapter, such as 3,0.5,1/3; equal if not given.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The base of all adapters, if they name it by different paths."),
    ] = None,
    json_lines: Json = False,
) -> None:
    """Merge PEFT's LoRA adapter folders DIR... into one, by a method of the federation.

    Ranks and alphas may differ. Says how far the result is from the weighted mean of the adapters' updates.
    """
    quiet(False)
    from fedpeft.report.tables import merged_table
    from fedpeft.strategies.merging.merge import merge_directories

    merged = merge_directories(
        how.method,
        directories,
        out,
        weights=None if weights is None else weights.split(","),
        rank=how.rank,
        options=how.options(),
        seed=how.seed,
        base=base,
    )
    saved(out)
    show(merged.to_dict(), merged_table, json_lines)
