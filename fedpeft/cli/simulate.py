"""Running a federation here, and scoring what came out."""

from __future__ import annotations

import shlex
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.cli.completion import strategy_names
from fedpeft.cli.options import Asked, Json, Verbose, prepare_workers, quiet, show, spread
from fedpeft.cli.output import saved
from fedpeft.cli.signals import stoppable
from fedpeft.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fedpeft.config import RunConfig
    from fedpeft.simulations.resuming import Resumption


@spread()
def simulate(
    asked: Asked,
    out: Annotated[Path | None, typer.Option(help="Exactly where the run directory goes.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with this run where it was; federation.rounds=N adds rounds, and --workers may differ.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; train nothing.")] = False,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Simulate a federation here: many clients, one machine or a Ray cluster.

    Without model and data it runs the embedded `digits` preset. Ctrl-C ends a run so that it can go on: the last lines
    say how.
    """
    if resume is not None:
        if out is not None or dry_run or asked.preset is not None:
            other = "--out" if out is not None else "--dry-run" if dry_run else "--preset"
            raise ConfigError(f"{other} does not go with --resume, which goes on with the run in '{resume}'; drop it.")
        _go_on(resume, asked, json_lines, verbose)
        return
    config = asked.config()
    _check_strategy(config.strategy.name)
    quiet(verbose)
    if dry_run:
        _dry_run(config, json_lines)
        return
    from fedpeft.runs import check_vacant

    if out is not None:
        check_vacant(out)
    prepare_workers(config.model_dump())
    from fedpeft.strategies import with_typed_options

    config = with_typed_options(config)
    if not json_lines:
        _introduce(config)
    _carry_out(config, out, None, json_lines, verbose)


def _check_strategy(name: str) -> None:
    """Refuse a strategy that is none, in the registry's words, before the libraries are imported that it needs."""
    if "fedpeft.strategies" in sys.modules:  # then the registry costs nothing, and tells by itself
        return
    if name not in (names := strategy_names()):
        raise ConfigError(f"unknown strategy '{name}'. {nearest(name, names)}")


def _go_on(run: Path, asked: Asked, json_lines: bool, verbose: bool) -> None:
    """Go on with a run, unless there is nothing left to do."""
    from fedpeft.config import merge

    quiet(verbose)
    layer = merge(asked.layers())
    if (sections := _kept(run)) is not None:
        prepare_workers({name: {**sections.get(name, {}), **layer.get(name, {})} for name in sections | layer})
    from fedpeft.report.console import JsonListener
    from fedpeft.runs import PAGE
    from fedpeft.simulations.resuming import caution, is_complete, resuming

    with resuming(run, layer) as resumption:
        config = resumption.config
        if is_complete(run, config):
            rounds = config.federation.rounds
            listener = JsonListener()
            if not (run / PAGE).exists():  # it was interrupted as that was drawn
                _write_report(run, listener)
            said = f"'{run}' is complete, all {rounds} rounds; more: federation.rounds={2 * rounds}, for example"
            if json_lines:
                listener({"event": "note", "round": rounds, "message": said})
            else:
                print(said)
            return
        if words := caution(run, config):
            print(f"warning: {words}", file=sys.stderr)
        _carry_out(config, run, resumption, json_lines, verbose)


def _kept(run: Path) -> dict[str, Any] | None:
    """Return the configuration of a run that seems worth a start of Ray."""
    from fedpeft.runs import CONFIG_FILE, PAGE

    try:
        written = tomllib.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # which is told later
    return None if (run / PAGE).exists() else {name: each for name, each in written.items() if isinstance(each, dict)}


def _carry_out(
    config: RunConfig, out: Path | None, resumption: Resumption | None, json_lines: bool, verbose: bool
) -> None:
    """Run, write the report, and exit as the run ended."""
    from fedpeft.report.console import JsonListener
    from fedpeft.report.terminal import TerminalListener
    from fedpeft.runs import CONFIG_FILE, default_directory

    out = out or default_directory(config)

    def how() -> str:
        return _command(out) if (out / CONFIG_FILE).exists() else ""

    with stoppable(how):
        with JsonListener() if json_lines else TerminalListener(config) as listener:
            from fedpeft.simulations.simulate import simulate as run

            if resumption is not None:
                resumption.recall = listener.recall
            outcome = run(config, out, listener=listener, verbose=verbose, resumption=resumption)
            _write_report(outcome.path, listener)
            listener.finish(outcome.path)
        saved(outcome.path)
        if outcome.error is not None:
            raise typer.Exit(outcome.error.exit_code)  # the summary has said why
        if outcome.reason == "interrupted":
            print(_command(outcome.path), file=sys.stderr)
            raise typer.Exit(outcome.exit_code)


def _command(run: Path) -> str:
    """Say how an interrupted run goes on."""
    return f"go on with: fedpeft simulate --resume {shlex.quote(str(run))}"


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


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.test=FILE] [section.key=value ...]", help="Other test rows.", show_default=False),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASK,...",
            help="Score it by lm-eval's tasks instead, or by task files of its form, such as hellaswag,mine.yaml.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each of lm-eval's tasks; all if not given.")] = None,
    client: Annotated[str | None, typer.Option(help="For lm-eval: whose model, where each client has its own.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="For lm-eval: ask in turns, by the run's chat template.")
    ] = False,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score a run's adapter, on its own test split or on other rows, or by the tasks of lm-eval."""
    quiet(verbose)
    if lm_eval is not None:
        if words:
            raise ConfigError(f"'{words[0]}' does not go with --lm-eval, whose tasks have rows of their own; drop it.")
        from fedpeft.harness import evaluate_tasks, results_table

        facts = evaluate_tasks(run, lm_eval, limit=limit, client=client, in_turns=apply_chat_template)
        show(facts, results_table, json_lines)
        return
    given = {"limit": limit is not None, "client": client is not None, "apply-chat-template": apply_chat_template}
    if alone := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(f"--{alone[0]} goes with --lm-eval.")
    from fedpeft.config import parse_overrides
    from fedpeft.report.tables import scores_table
    from fedpeft.rescoring import caution, rescore

    scores = rescore(run, parse_overrides(words or ()))
    show(scores, scores_table, json_lines)
    if (words_of_caution := caution(scores)) is not None:
        print(f"warning: {words_of_caution}", file=sys.stderr)
