"""A run's model for others: merged, or the adapter with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.cli.options import Json, Verbose, quiet, show
from fedpeft.cli.output import saved
from fedpeft.errors import ConfigError


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="The folder to write; must not hold anything.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Write a transformers folder with the adapter in the weights.")
    ] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write PEFT's adapter with a model card.")] = False,
    client: Annotated[str | None, typer.Option(help="Whose model, where each client has its own.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of merged weights: float32, bfloat16 or float16; the run's if not given.")
    ] = None,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's model for others: a whole transformers folder, or the adapter with a model card.

    The card says base, method, rounds, scores and what may be said of privacy; no row is in it.
    """
    if merged == adapter:
        raise ConfigError("give --merged, for a folder of transformers, or --adapter, for PEFT's: one of both.")
    if dtype is not None and not merged:
        raise ConfigError("--dtype goes with --merged: an adapter is written as it was trained.")
    quiet(verbose)
    from fedpeft.exporting import export_adapter, export_merged

    facts = export_merged(run, out, client=client, dtype=dtype) if merged else export_adapter(run, out, client=client)
    saved(out)
    show(facts, _table, json_lines)


def _table(facts: dict[str, Any]) -> Any:
    from fedpeft.report.layout import pairs

    written = "merged model" if facts["merged"] else "adapter and model card"
    rows = [("run", facts["run"]), ("base", facts["base"]), ("client", facts.get("client"))]
    rows += [("type", facts.get("dtype")), (written, facts["out"])]
    return pairs([(name, value) for name, value in rows if value])
