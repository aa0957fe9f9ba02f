"""The commands below ``fedpeft privacy``. Heavy imports wait inside them, as in `fedpeft.cli`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fedpeft.cli.options import (
    Clients,
    Json,
    PresetName,
    Rounds,
    Seed,
    Verbose,
    Words,
    Workers,
    configure,
    end_of_runs,
    quiet,
    show,
)
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedpeft.config.privacy import Accountant

privacy_app = typer.Typer(
    help="Differential privacy: noise, budgets, ledgers, sweeps and audits.", no_args_is_help=True
)

Delta = Annotated[float, typer.Option(help="Of the guarantee; keep it below 1 / number of records.")]
AccountantName = Annotated[
    str, typer.Option("--accountant", help="prv, or the looser rdp; where prv cannot compute, rdp does.")
]

ASSUMED = (
    "Assumed: {drawn}, data sets differ in one record added or removed, row counts are public, and the randomness "
    "stays secret."
)
POISSON, ALL = "batches are Poisson samples", "every record is in every step"
NO_PRIVACY = "no privacy: epsilon is infinite"


# --- how much noise, and what it costs ---------------------------------------------------------------------------


@privacy_app.command()
def noise(
    epsilon: Annotated[float, typer.Option(help="Budget over all rounds.")],
    rounds: Annotated[
        int,
        typer.Option(
            help="Rounds that a client takes part in; at client level all rounds, with --sample-rate "
            "federation.fraction and --local-steps 1."
        ),
    ],
    examples: Annotated[int | None, typer.Option(help="Rows of the client.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step draws on average.")] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="Chance of each row to be in a batch, in place of --batch-size.")
    ] = None,
    local_steps: Annotated[int | None, typer.Option(help="Steps of a round.")] = None,
    local_epochs: Annotated[int | None, typer.Option(help="Passes of a round, in place of --local-steps.")] = None,
    delta: Delta = 1e-5,
    accountant: AccountantName = "prv",
    json_lines: Json = False,
) -> None:
    """Find the least noise with which DP-SGD stays within a budget.

    For example `fedpeft privacy noise --epsilon 3 --examples 500 --batch-size 32 --local-steps 10 --rounds 20`.
    """
    quiet(False)
    for name, count in (
        *(("--rounds", rounds), ("--examples", examples), ("--batch-size", batch_size)),
        *(("--local-steps", local_steps), ("--local-epochs", local_epochs)),
    ):
        if count is not None and count < 1:
            raise ConfigError(f"{name} {count} is too few; give a whole number of 1 or more.")
    rate = _sample_rate(sample_rate, examples, batch_size)
    steps = rounds * _round_steps(local_steps, local_epochs, rate)
    from fedpeft.privacy.accounting import Charge, spent
    from fedpeft.privacy.calibration import calibrate

    chosen = cast("Accountant", accountant)  # which is checked there
    multiplier = calibrate(epsilon, delta, rate, steps, chosen)
    found = spent([Charge(multiplier, rate, steps)], delta, chosen)
    if examples is not None and delta * examples >= 1:
        print(
            f"warning: delta {delta:g} is no less than 1 / {examples} rows, so one row may be given away whole; "
            f"give --delta below 1/{examples}.",
            file=sys.stderr,
        )
    _show_cost(multiplier, found.epsilon, delta, found.accountant, rate, steps, json_lines)


@privacy_app.command("epsilon")
def epsilon_command(
    noise_multiplier: Annotated[float, typer.Option(help="Standard deviation of the noise over the clipping norm.")],
    sample_rate: Annotated[float, typer.Option(help="Chance of each row to be in a batch.")],
    steps: Annotated[int, typer.Option(help="Steps over all rounds.")],
    delta: Delta = 1e-5,
    accountant: AccountantName = "prv",
    json_lines: Json = False,
) -> None:
    """Find what so many steps of DP-SGD cost.

    For example `fedpeft privacy epsilon --noise-multiplier 1.1 --sample-rate 0.064 --steps 200`.
    """
    quiet(False)
    from fedpeft.privacy.accounting import Charge, spent

    charge = Charge(noise_multiplier, sample_rate, steps)
    found = spent([charge], delta, cast("Accountant", accountant))
    _show_cost(noise_multiplier, found.epsilon, delta, found.accountant, sample_rate, steps, json_lines)


def _sample_rate(sample_rate: float | None, examples: int | None, batch_size: int | None) -> float:
    if sample_rate is not None:
        if batch_size is not None:
            raise ConfigError("--sample-rate and --batch-size say the same twice; give one of them.")
        if not 0 < sample_rate <= 1:
            raise ConfigError(f"--sample-rate {sample_rate} is not allowed; give a number above 0 and up to 1.")
        return sample_rate
    if examples is None or batch_size is None:
        raise ConfigError(
            "the chance of a row to be in a batch is not known; give --examples and --batch-size, or --sample-rate."
        )
    return min(1.0, batch_size / examples)


def _round_steps(local_steps: int | None, local_epochs: int | None, sample_rate: float) -> int:
    if local_steps is not None and local_epochs is not None:
        raise ConfigError("--local-steps and --local-epochs say the same twice; give one of them.")
    if local_steps is None and local_epochs is None:
        raise ConfigError("the steps of a round are not known; give one of --local-steps and --local-epochs.")
    # a pass has ceil(rows / batch size) steps, as in training; the quotient of a quotient may be off in its last bit
    return local_steps or (local_epochs or 1) * math.ceil(1 / sample_rate - 1e-9)


def _show_cost(
    noise_multiplier: float,
    epsilon: float,
    delta: float,
    accountant: str,
    sample_rate: float,
    steps: int,
    json_lines: bool,
) -> None:
    facts = {
        "noise_multiplier": noise_multiplier,
        "epsilon": epsilon if math.isfinite(epsilon) else None,  # infinity is no JSON
        "delta": delta,
        "accountant": accountant,
        "sample_rate": sample_rate,
        "steps": steps,
    }
    show(facts, _cost_table, json_lines)


def _cost_table(facts: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from fedpeft.report.layout import pairs
    from fedpeft.rounding import number

    infinite = facts["epsilon"] is None
    names = {
        "prv": "prv: composition of privacy random variables",
        "rdp": "rdp: Renyi differential privacy, a looser bound",
        "gaussian": "analytic: every row takes part in every step",
    }
    rows = [
        ("noise multiplier", f"{facts['noise_multiplier']:.6g}"),
        ("epsilon", number(math.inf if infinite else facts["epsilon"])),
        ("delta", f"{facts['delta']:g}"),
        ("sample rate", f"{facts['sample_rate']:.6g}"),
        ("steps", str(facts["steps"])),
        *([] if infinite else [("accountant", names[facts["accountant"]])]),
    ]
    assumed = ASSUMED.format(drawn=ALL if facts["sample_rate"] == 1 else POISSON)
    return Group(pairs(rows), Text(), Text(NO_PRIVACY if infinite else assumed))


# --- who spent what, and what it buys ----------------------------------------------------------------------------


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


@privacy_app.command()
def sweep(
    words: Words = None,
    epsilons: Annotated[str, typer.Option(help="Budgets, commas between; inf trains without privacy.")] = "1,3,6,inf",
    adapters: Annotated[
        str | None, typer.Option(help="Kinds of adapter, commas between; the configuration's if not given.")
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            help="Methods, commas between, NAME or NAME:option=value[,option=value]; the configuration's if not given."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds to run each with, from --seed on.")] = 1,
    level: Annotated[str, typer.Option(help="What is protected: record, or client.")] = "record",
    delta: Annotated[float | None, typer.Option(help="privacy.delta of all runs.")] = None,
    preset: PresetName = None,
    clients: Clients = None,
    rounds: Rounds = None,
    workers: Workers = None,
    seed: Seed = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all runs, runs/sweep-TIME if not given; kept if done.")
    ] = None,
    json_lines: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train every adapter with every strategy at every budget, and show utility against epsilon.

    The epsilon that is shown is what each run states that it spent, over all rounds. Noise is calibrated to each
    budget, and every combination is checked before anything runs.

    Writes OUT/COMBINATION/seed-N/, sweep.json, sweep.md and sweep.png. With the same words and --out, an interrupted
    sweep goes on where it was.
    """
    quiet(verbose)
    if level not in ("record", "client"):
        raise ConfigError(f"--level {level} does not exist; give record or client (--epsilons inf is without privacy).")
    from fedpeft.report.sweep import sweep_table
    from fedpeft.simulations.compare import default_folder
    from fedpeft.simulations.running import run_jobs
    from fedpeft.simulations.sweep import (
        plan_sweep,
        private_words,
        split_adapters,
        split_epsilons,
        split_strategies,
        sweep_points,
        write_sweep,
    )

    budgets = split_epsilons(epsilons)
    config = configure(
        private_words(words or (), budgets, level, delta),
        preset=preset,
        clients=clients,
        rounds=rounds,
        workers=workers,
        seed=seed,
    )
    kinds = [None] if adapters is None else split_adapters(adapters)
    methods = [config.strategy.name] if strategies is None else split_strategies(strategies)
    folder = out or default_folder("sweep")
    jobs = plan_sweep(sweep_points(kinds, methods, budgets, config.privacy), config, seeds, folder)
    swept = run_jobs(jobs, config, tell=lambda line: print(line, file=sys.stderr, flush=True), verbose=verbose)
    facts = write_sweep(jobs, swept, folder)
    if swept.runs or json_lines:
        show(facts, sweep_table, json_lines)
    if not json_lines:
        print(f"saved {folder}/sweep.md, sweep.json" + (" and sweep.png" if swept.runs else ""))
    end_of_runs(swept, len(jobs), folder, out)


# --- what a run's planted rows show ------------------------------------------------------------------------------


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
