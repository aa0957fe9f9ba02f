"""The commands below ``fedpeft privacy``: ledgers and audits here, noise and sweeps in files of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedpeft.cli.noise import epsilon_command, noise
from fedpeft.cli.options import Json, quiet, show
from fedpeft.cli.sweep import sweep
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from fedpeft.config.privacy import Accountant

privacy_app = typer.Typer(
    help="Differential privacy: noise, budgets, ledgers, sweeps and audits.", no_args_is_help=True
)
privacy_app.command()(noise)
privacy_app.command("epsilon")(epsilon_command)


@privacy_app.command()
def ledger(
    run: Annotated[
        Path | None,
        typer.Argument(help="A private run's directory, or a site's own ledger file (*.jsonl).", show_default=False),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="At which a site's ledger is summed up, 1e-5 if not given; a run has its own.")
    ] = None,
    accountant: Annotated[
        str | None, typer.Option(help="prv or rdp, for a site's ledger, prv if not given; a run has its own.")
    ] = None,
    create: Annotated[
        Path | None, typer.Option(help="Make a site's ledger in this new file, for rows that it is to keep account of.")
    ] = None,
    converted: Annotated[
        Path | None,
        typer.Option(
            "--from", help="With --create: begin with all charges of this ledger of an earlier version (not chained)."
        ),
    ] = None,
    json_lines: Json = False,
) -> None:
    """Show who spent what over all rounds, of a run that is done, goes on or was killed.

    Of a site's own ledger, show what all runs in it spent together on the site's rows. With --create, make one.
    """
    quiet(False)
    if create is not None:
        given = {"a run or ledger to show": run, "--delta": delta, "--accountant": accountant}
        if extra := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"--create {create} makes a ledger and shows none; drop {extra[0]}.")
        _create_ledger(create, converted, json_lines)
        return
    if converted is not None:
        raise ConfigError(f"--from {converted} goes with --create NEW, the file that its charges are copied into.")
    if run is None:
        raise ConfigError("no ledger is named; give a run directory or a ledger file, or --create NEW to make one.")
    from fedpeft.privacy.spending import read_spending
    from fedpeft.report.privacy import ledger_table

    chosen = cast("Accountant | None", accountant)  # which is checked there
    show(read_spending(run, delta, chosen), ledger_table, json_lines)


def _create_ledger(file: Path, converted: Path | None, json_lines: bool) -> None:
    from fedpeft.privacy.chain import read_unchained
    from fedpeft.privacy.ledger import Ledger

    entries = [] if converted is None else read_unchained(converted)
    path = Ledger.create(file, entries=entries).path
    if json_lines:
        print(json.dumps({"ledger": str(path), "charges": len(entries)}))
        return
    print(f"made {path} with {len(entries)} charges")
    print(f"start the SuperNode with --node-config '... privacy-ledger=\"{path}\"', in all runs on the same rows")


privacy_app.command()(sweep)


@privacy_app.command()
def audit(
    run: Annotated[
        Path,
        typer.Argument(help="A run directory, simulated with privacy.canaries=200 or more; any for --white-box."),
    ],
    guesses: Annotated[
        int | None,
        typer.Option(
            help="How many canaries to guess at, half of them as included; if not given, a tenth, a quarter, a half "
            "and all are tried, and the confidence is divided among them."
        ),
    ] = None,
    white_box: Annotated[
        bool,
        typer.Option(
            "--white-box",
            help="Look at the noised sums that leave a client in place of the last adapter; needs no canaries.",
        ),
    ] = False,
    draws: Annotated[
        int | None,
        typer.Option(help="Of --white-box: noised sums with a row, and as many without; 1000 if not given."),
    ] = None,
    json_lines: Json = False,
) -> None:
    """Hold a run against what it claims, by the canaries that it planted, or from inside.

    Prints a lower bound at 95 % confidence, which is no estimate. Exit code 1 where it is above the claim: something is
    broken then.
    """
    quiet(False)
    from fedpeft.report.audited import audit_view, white_box_view

    if white_box:
        if guesses is not None:
            raise ConfigError("--guesses is about canaries, and --white-box needs none; give --draws.")
        from fedpeft.privacy.white_box import DRAWS, white_box_audit

        facts = white_box_audit(run, DRAWS if draws is None else draws)
        show(facts, white_box_view, json_lines)
    else:
        if draws is not None:
            raise ConfigError("--draws is about --white-box; give that too, or --guesses.")
        from fedpeft.privacy.audit import audit_run

        facts = audit_run(run, guesses)
        show(facts, audit_view, json_lines)
    if facts["violated"]:
        raise typer.Exit(1)
