"""What the commands of the command line share: their options, the configuration that words make, and how facts show."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from fedpeft.adapters.kinds import AdapterKind
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedpeft.config import RunConfig
    from fedpeft.simulations.running import Compared

INTERRUPTED = 130

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.toml] [section.key=value ...]",
        help="A configuration file, and settings that override it, such as train.learning_rate=1e-3.",
        show_default=False,
    ),
]
Strategy = Annotated[str | None, typer.Option(help="The server's method; see `fedpeft strategies`.")]
Adapter = Annotated[str | None, typer.Option(help=f"Kind of adapter: {', '.join(get_args(AdapterKind))}.")]
PresetName = Annotated[str | None, typer.Option("--preset", help="Embedded model and data; see `fedpeft presets`.")]
Clients = Annotated[int | None, typer.Option(help="Number of clients.")]
Rounds = Annotated[int | None, typer.Option(help="Rounds of training.")]
Workers = Annotated[int | None, typer.Option(help="Ray workers, one per core if not given; 0 trains in this process.")]
Seed = Annotated[int | None, typer.Option(help="Everything random follows from it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines for machines.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Let the libraries below speak.")]

DEFAULT_PRESET = "digits"


def configure(
    words: list[str] | None,
    *,
    strategy: str | None = None,
    adapter: str | None = None,
    preset: str | None = None,
    clients: int | None = None,
    rounds: int | None = None,
    workers: int | None = None,
    seed: int | None = None,
) -> RunConfig:
    """Lay command line over file over preset over defaults; without model and data, the default preset."""
    from fedpeft.config import merge, parse_overrides, read_toml, resolve, with_absolute_paths
    from fedpeft.presets import layer

    files = [word for word in words or () if word.endswith(".toml") and "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"two configuration files, '{files[0]}' and '{files[1]}'; one is allowed.")
    options = {
        "strategy.name": strategy,
        "adapter.kind": adapter,
        "federation.clients": clients,
        "federation.rounds": rounds,
        "simulation.workers": workers,
        "run.seed": seed,
    }
    # options are words with names of their own: both are one layer, so that neither takes back the other
    typed = [word for word in words or () if word not in files]
    typed += [f"{name}={value}" for name, value in options.items() if value is not None]
    layers = [*(read_toml(Path(file)) for file in files), parse_overrides(typed)]
    own = merge(layers)
    if preset is None and "name" not in own.get("model", {}) and "source" not in own.get("data", {}):
        preset = DEFAULT_PRESET
    return with_absolute_paths(resolve([*([layer(preset)] if preset else []), *layers]))


def quiet(verbose: bool) -> None:
    """Silence the libraries below, unless they are to speak."""
    from fedpeft.chatter import silence

    if not verbose:
        silence()


def show(facts: Any, table: Callable[[Any], RenderableType], json_lines: bool) -> None:
    """Print facts for machines, or the table that shows them."""
    if json_lines:
        from fedpeft.jsons import to_json

        print(to_json(facts))
        return
    from rich.console import Console

    Console().print(table(facts))


def end_of_runs(compared: Compared, total: int, folder: Path, out: Path | None) -> None:
    """Exit as several runs ended: with the words to go on with, where they were interrupted.

    Parameters
    ----------
    compared : Compared
        How they ended.
    total : int
        How many there were to be.
    folder : Path
        Where they are.
    out : Path, optional
        The folder that the user named, if any.
    """
    if compared.interrupted:
        again = sys.argv[1:] if out is not None else [*sys.argv[1:], "--out", str(folder)]
        line = f"{len(compared.runs)} of {total} runs are done; go on with: fedpeft {shlex.join(again)}"
        print(f"interrupted: {line}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    if compared.failed:
        raise typer.Exit(1)  # each was told of when it failed
