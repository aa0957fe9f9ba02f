"""The command line. Heavy imports wait inside the commands, so that ``fedpeft --help`` answers at once."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.cli.options import (
    INTERRUPTED,
    Adapter,
    Clients,
    Json,
    PresetName,
    Rounds,
    Seed,
    Strategy,
    Verbose,
    Words,
    Workers,
    configure,
    end_of_runs,
    quiet,
    show,
)
from fedpeft.cli.output import saved, secure
from fedpeft.cli.privacy import privacy_app
from fedpeft.errors import ConfigError, FedpeftError

if TYPE_CHECKING:
    from fedpeft.config import RunConfig

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
app.add_typer(privacy_app, name="privacy")


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
    quiet(verbose)
    if dry_run:
        _dry_run(config, json_lines)
        return
    from fedpeft.report.console import JsonListener
    from fedpeft.report.terminal import TerminalListener
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
    saved(outcome.path)
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


def _dry_run(config: RunConfig, json_lines: bool) -> None:
    from fedpeft.report.planned import dry_run_table
    from fedpeft.simulations.plan import plan

    planned = plan(config)
    show(planned.to_dict(), lambda facts: dry_run_table(facts, planned.config), json_lines)


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
    quiet(verbose)
    from fedpeft.config import parse_overrides
    from fedpeft.report.tables import scores_table
    from fedpeft.rescoring import caution, rescore

    scores = rescore(run, parse_overrides(words or ()))
    show(scores, scores_table, json_lines)
    if (words_of_caution := caution(scores)) is not None:
        print(f"warning: {words_of_caution}", file=sys.stderr)


@app.command()
def merge(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="PEFT's LoRA adapter folders.")],
    method: Annotated[str, typer.Option(help="How to merge; see `fedpeft strategies`.")],
    out: Annotated[Path, typer.Option(help="The folder to write; must not hold anything.")],
    weights: Annotated[
        str | None, typer.Option(help="A positive number for each adapter, such as 3,0.5,1/3; equal if not given.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result; the largest of the adapters' if not given.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
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

    pairs = [word.partition("=") for word in option or ()]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"--option '{name}' is not of the form key=value, such as reweight=paper.")
    merged = merge_directories(
        method,
        directories,
        out,
        weights=None if weights is None else weights.split(","),
        rank=rank,
        options={name.strip().removeprefix("strategy."): value.strip() for name, _, value in pairs},
        seed=seed,
        base=base,
    )
    saved(out)
    show(merged.to_dict(), merged_table, json_lines)


@app.command()
def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="METHOD... [CONFIG.toml] [section.key=value ...]",
            help="Methods, each NAME or NAME:option=value[,option=value]; and what they share, as for simulate.",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="How many seeds to run each method with, from --seed on.")] = 1,
    adapter: Adapter = None,
    preset: PresetName = None,
    clients: Clients = None,
    rounds: Rounds = None,
    workers: Workers = None,
    seed: Seed = None,
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
    comparison goes on where it was: runs that are complete are not repeated.
    """
    quiet(verbose)
    from fedpeft.report.comparison import comparison_table
    from fedpeft.simulations.compare import default_folder, split_words, write_comparison
    from fedpeft.simulations.jobs import plan_jobs
    from fedpeft.simulations.running import run_jobs

    rows, rest = split_words(words)
    config = configure(rest, adapter=adapter, preset=preset, clients=clients, rounds=rounds, workers=workers, seed=seed)
    folder = out or default_folder()
    jobs = plan_jobs(rows, config, seeds, folder)
    compared = run_jobs(jobs, config, tell=lambda line: print(line, file=sys.stderr, flush=True), verbose=verbose)
    facts = write_comparison(jobs, compared, folder)
    saved(folder)
    if compared.runs or json_lines:
        show(facts, comparison_table, json_lines)
    if not json_lines:
        print(f"saved {folder}/comparison.md and comparison.json")
    end_of_runs(compared, len(jobs), folder, out)


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
    quiet(verbose)
    from fedpeft.data.partition import partition_table, plot_partition
    from fedpeft.report.holdings import partition_view
    from fedpeft.resident import resident

    home = resident(config)
    table = partition_table(home.partition, home.data.train, home.data.labels)
    for note in home.data.notes:
        print(f"note: {note}", file=sys.stderr)
    show(table, partition_view, json_lines)
    if plot is not None:
        try:
            plot_partition(plot, home.partition, home.data.train, home.data.labels)
        except OSError as error:
            raise ConfigError(f"cannot write '{plot}': {error.strerror or error}") from None


@app.command()
def strategies(json_lines: Json = False) -> None:
    """List the server's methods and their options."""
    quiet(False)
    from fedpeft.report.tables import strategies_table
    from fedpeft.strategies import available
    from fedpeft.strategies.catalogue import catalogue

    show(catalogue(available()), strategies_table, json_lines)


@app.command()
def env(json_lines: Json = False) -> None:
    """Show what is installed, for bug reports."""
    quiet(False)
    from fedpeft.report.tables import environment_table
    from fedpeft.runs import environment

    facts = environment()
    show(facts, environment_table, json_lines)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where run directories are.")] = Path("runs"), json_lines: Json = False
) -> None:
    """List runs."""
    from fedpeft.report.runs import runs_table
    from fedpeft.runs.listing import list_runs

    show(list_runs(folder), lambda runs: runs_table(runs, folder), json_lines)


@presets_app.callback()
def presets(context: typer.Context, json_lines: Json = False) -> None:
    """List the embedded models and data."""
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from fedpeft.presets import PRESETS
    from fedpeft.report.tables import presets_table

    found = [asdict(preset) for preset in PRESETS.values()]
    show(found, presets_table, json_lines)


@presets_app.command()
def fetch(name: Annotated[str, typer.Argument(help="The preset to fetch: chat.")]) -> None:
    """Fetch and check the packages that a preset needs and that cannot be an extra."""
    quiet(False)
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
    quiet(verbose)
    from fedpeft.cli.app_folder import init_app

    print(init_app(directory, config, out))


def main() -> None:
    """Run the command line; an error of the user's becomes one line and exit code 2."""
    output = secure()
    try:
        sys.exit(output.exit_code(_run()))
    finally:
        # Python would look through all objects of torch and its company once more, for over a second, before it leaves
        gc.freeze()


def _run() -> int:
    """Run the command that sys.argv names, and return its exit code."""
    try:
        _check_words(sys.argv[1:])
        app()
    except SystemExit as end:  # as every command ends
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except FedpeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _check_words(words: list[str]) -> None:
    """Refuse words with bytes that the locale's encoding has no letters for: no file could keep them."""
    for word in words:
        if any("\udc80" <= letter <= "\udcff" for letter in word):
            raise ConfigError(
                f"'{ascii(word)[1:-1]}' is no text in this locale's encoding, {sys.getfilesystemencoding()}; set "
                "PYTHONUTF8=1 or a UTF-8 locale, or give a name in plain letters."
            )
