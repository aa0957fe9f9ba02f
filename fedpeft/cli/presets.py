"""The commands below ``fedpeft presets``."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpeft.cli.completion import complete_preset
from fedpeft.cli.options import Json, quiet, show

presets_app = typer.Typer(help="Models and data that come with fedpeft.", invoke_without_command=True)


@presets_app.callback()
def presets(context: typer.Context, json_lines: Json = False) -> None:
    """List the embedded models and data."""
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from fedpeft.presets import PRESETS
    from fedpeft.report.tables import presets_table

    show(
        [{"name": preset.name, "task": preset.task, **asdict(preset)} for preset in PRESETS.values()],
        presets_table,
        json_lines,
    )


@presets_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The preset to fetch: chat.", autocompletion=complete_preset)],
) -> None:
    """Fetch and check the packages that a preset needs and that cannot be an extra."""
    quiet(False)
    from fedpeft.presets import fetch as fetch_preset

    print(fetch_preset(name))
