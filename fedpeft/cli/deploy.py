"""The commands below ``fedpeft deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Asked, Verbose, quiet, spread

deploy_app = typer.Typer(help="Run on real Flower SuperNodes.", no_args_is_help=True)


@deploy_app.command()
@spread(without={"workers"})
def init(
    directory: Annotated[Path, typer.Argument(help="The folder to write; must not hold anything.")],
    asked: Asked,
    out: Annotated[Path | None, typer.Option(help="Run directory on the server's side.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write a Flower app folder that `flwr run` runs on a SuperLink, with the arguments of simulate."""
    config = asked.config()
    quiet(verbose)
    from fedpeft.cli.app_folder import init_app

    print(init_app(directory, config, out))
