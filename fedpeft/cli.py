"""The command line. Heavy imports wait inside the commands, so that ``fedpeft --help`` answers at once."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.errors import ConfigError, FedpeftError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedpeft.config import RunConfig

INTERRUPTED = 130

app = typer.Typer(
    name="fedpeft",
    help="Fine-tune transformers with LoRA adapters on data that stays with its owners.",
    epilog="Start with: fedpeft simulate --strategy lora-fair",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
presets_app = typer.Typer(help="Models and data that come with fedpeft.", invoke_without_command=True)
deploy_app = typer.Typer(help="Run on real Flower SuperNodes.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")
app.add_typer(deploy_app, name="deploy")

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.toml] [section.key=value ...]",
        help="A configuration file, and settings that override it, such as train.learning_rate=1e-3.",
        show_default=False,
    ),
]
Strategy = Annotated[str | None, typer.Option(help="The server's method; see `fedpeft strategies`.")]
Adapter = Annotated[str | None, typer.Option(help="lora, or ffa-lora (A frozen).")]
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


@app.command()
def simulate(
    words: Words = None,
    strategy: Strategy = None,
    adapter: Adapter = None,
    preset: PresetName = None,
    clients: Clients = None,
    rounds: Rounds = None,
    workers: Workers = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option(help="Exactly where the run directory goes.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; train nothing.")] = False,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Simulate a federation here: many clients, one machine or a Ray cluster.

    Without model and data it runs the embedded `digits` preset.
    """
    config = configure(
        words,
        strategy=strategy,
        adapter=adapter,
        preset=preset,
        clients=clients,
        rounds=rounds,
        workers=workers,
        seed=seed,
    )
    _quiet(verbose)
    if dry_run:
        _dry_run(config, json_lines)
        return
    from fedpeft.report.terminal import JsonListener, TerminalListener
    from fedpeft.runs import check_vacant
    from fedpeft.strategies import with_typed_options

    if out is not None:
        check_vacant(out)
    config = with_typed_options(config)
    if not json_lines:
        _introduce(config)
    with JsonListener() if json_lines else TerminalListener(config) as listener:
        from fedpeft.simulations.simulate import simulate as run

        outcome = run(config, out, listener=listener, verbose=verbose)
        _write_report(outcome.path, listener)
        listener.finish(outcome.path)
    if outcome.error is not None:
        raise typer.Exit(outcome.error.exit_code)  # the summary has said why
    if outcome.reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _introduce(config: RunConfig) -> None:
    """Say what an embedded base model is, a toy where it is one, before anybody reads a score."""
    from fedpeft.presets import PRESETS

    for name, preset in PRESETS.items():
        if config.model.name == f"preset:{name}":
            print(f"preset {name}: {preset.description}")


def _write_report(path: Path, listener: Any) -> None:
    """Draw plots and page; a run is not lost because they could not be written."""
    from fedpeft.report.page import write_report

    try:
        write_report(path)
    except OSError as error:
        listener({"event": "warning", "round": 0, "message": f"no report: {error}"})


def _quiet(verbose: bool) -> None:
    from fedpeft.chatter import silence

    if not verbose:
        silence()


def _dry_run(config: RunConfig, json_lines: bool) -> None:
    from fedpeft.report.planned import dry_run_table
    from fedpeft.strategies.plan import plan

    planned = plan(config)
    _show(planned.to_dict(), lambda _: dry_run_table(planned), json_lines)


def _show(facts: Any, table: Callable[[Any], RenderableType], json_lines: bool) -> None:
    """Print facts for machines, or the table that shows them."""
    if json_lines:
        print(json.dumps(facts))
        return
    from rich.console import Console

    Console().print(table(facts))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.test=FILE] [section.key=value ...]", help="Other test rows.", show_default=False),
    ] = None,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score a run's adapter, on its own test split or on other rows."""
    _quiet(verbose)
    from fedpeft.config import parse_overrides
    from fedpeft.report.tables import scores_table
    from fedpeft.rescoring import rescore

    scores = rescore(run, parse_overrides(words or ()))
    _show(scores, scores_table, json_lines)


@app.command()
def partition(
    words: Words = None,
    preset: PresetName = None,
    clients: Clients = None,
    seed: Seed = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show who holds what."""
    config = configure(words, preset=preset, clients=clients, seed=seed)
    _quiet(verbose)
    from fedpeft.data.partition import partition_table, plot_partition
    from fedpeft.report.holdings import partition_view
    from fedpeft.resident import resident

    home = resident(config)
    table = partition_table(home.partition, home.data.train, home.data.labels)
    _show(table, partition_view, json_lines)
    if plot is not None:
        try:
            plot_partition(plot, home.partition, home.data.train, home.data.labels)
        except OSError as error:
            raise ConfigError(f"cannot write '{plot}': {error.strerror or error}") from None


@app.command()
def strategies(json_lines: Json = False) -> None:
    """List the server's methods and their options."""
    _quiet(False)
    from fedpeft.report.tables import strategies_dict, strategies_table

    _show(strategies_dict(), strategies_table, json_lines)


@app.command()
def env(json_lines: Json = False) -> None:
    """Show what is installed, for bug reports."""
    _quiet(False)
    from fedpeft.report.tables import environment_table
    from fedpeft.runs import environment

    facts = environment()
    _show(facts, environment_table, json_lines)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where run directories are.")] = Path("runs"), json_lines: Json = False
) -> None:
    """List runs."""
    from fedpeft.report.runs import runs_list, runs_table

    found = runs_list(folder)
    _show(found, lambda runs: runs_table(runs, folder), json_lines)


@presets_app.callback()
def presets(context: typer.Context, json_lines: Json = False) -> None:
    """List the embedded models and data."""
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from fedpeft.presets import PRESETS
    from fedpeft.report.tables import presets_table

    found = [asdict(preset) for preset in PRESETS.values()]
    _show(found, presets_table, json_lines)


@presets_app.command()
def fetch(name: Annotated[str, typer.Argument(help="The preset to fetch: chat.")]) -> None:
    """Fetch and check the packages that a preset needs and that cannot be an extra."""
    _quiet(False)
    from fedpeft.presets import fetch as fetch_preset

    print(fetch_preset(name))


@deploy_app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="The folder to write; must not hold anything.")],
    words: Words = None,
    strategy: Strategy = None,
    adapter: Adapter = None,
    preset: PresetName = None,
    clients: Clients = None,
    rounds: Rounds = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option(help="Run directory on the server's side.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write a Flower app folder that `flwr run` runs on a SuperLink, with the arguments of simulate."""
    config = configure(
        words, strategy=strategy, adapter=adapter, preset=preset, clients=clients, rounds=rounds, seed=seed
    )
    _quiet(verbose)
    from fedpeft.deployment import init_app

    print(init_app(directory, config, out))


def main() -> None:
    """Run the command line; an error of the user's becomes one line and exit code 2."""
    try:
        app()
    except FedpeftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        # Python would look through all objects of torch and its company once more, for over a second, before it leaves
        gc.freeze()
