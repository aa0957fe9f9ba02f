"""Who spent what, as a ledger has it: of a run that is over, goes on or was killed, and of a site over all its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.config.privacy import Accountant
from fedpeft.errors import ConfigError, LedgerError, RunDirectoryError
from fedpeft.jsons import strict_json
from fedpeft.privacy.accounting import spent
from fedpeft.privacy.ledger import EVERYBODY, LEDGER, Entry, read_entries
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.statement import Facts, read_statement, state, void
from fedpeft.rounding import upwards
from fedpeft.runs import CONFIG_FILE, read_config
from fedpeft.runs.history import History

DELTA = 1e-5  # at which a site's ledger is summed up unless another is asked for
COMPUTED = {
    "prv": "PRV, composed over every step that was charged",
    "rdp": "RDP, composed over every step that was charged",
    "gaussian": "the analytic Gaussian, as all rows took part in every step",
}
UNFINISHED = "the run goes on, or was killed: this is what its ledger holds so far"


def read_spending(path: Path, delta: float | None = None, accountant: Accountant | None = None) -> Facts:
    """Return what a run's directory, or a site's own ledger file, says of who spent what.

    Parameters
    ----------
    path : Path
        Either of them; a ledger that lies in a run directory is the run's.
    delta : float, optional
        For a site's ledger, `DELTA` if not given; a run has its own.
    accountant : {"prv", "rdp"}, optional
        For a site's ledger, ``prv`` if not given; a run has its own.

    Returns
    -------
    dict
        Either ``clients``, a list of dict, with ``epsilon_max`` and ``epsilon_median``; or ``runs``, with ``epsilon``
        of all together. Beside it ``delta``, ``accountant``, ``guarantee`` and a ``statement`` in words.

    Raises
    ------
    RunDirectoryError
        There is no such run or file.
    ConfigError
        The run is not private, or delta and accountant are given for a run.
    LedgerError
        The ledger cannot be read.
    """
    if path.suffix == ".jsonl" or path.is_file():
        if path.name != LEDGER or not (path.parent / CONFIG_FILE).is_file():
            return site_spending(path, DELTA if delta is None else delta, accountant or "prv")
        path = path.parent
    given = {"--delta": delta, "--accountant": accountant}
    for option, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{option} {value} is for a site's ledger file; a run is summed up at its own delta, by its own "
                "accountant. Drop it."
            )
    return run_spending(path)


def run_spending(run: Path) -> Facts:
    """Return what each client of a run spent; see `read_spending`."""
    if not run.is_dir():
        raise RunDirectoryError(f"no run directory and no ledger file (*.jsonl) '{run}'. `fedpeft runs` lists runs.")
    config = read_config(run)
    privacy = config.privacy
    if not privacy.is_private:
        raise ConfigError(
            f"'{run}' is not private, and has no ledger: its privacy.level is 'none'. Give `fedpeft simulate` "
            "privacy.level=record, or client."
        )
    # what was stated at an end that is on record no more says less than has been charged since
    statement = read_statement(run) if History.read(run).end is not None else None
    held: dict[str, list[Entry]] = {}
    if not level_of(privacy).hides_cohort:
        held = {client: [] for client in (statement or {}).get("clients", {})}  # also those who were never asked
    if not (run / LEDGER).exists():
        raise LedgerError(
            f"'{run}' holds no {LEDGER}, which every private run begins with: it was removed, and what was spent "
            "cannot be summed up. Put it back with all its charges."
        )
    for entry in read_entries(run / LEDGER):
        held.setdefault(entry.client, []).append(entry)
    stated = not void(privacy)
    clients = [
        {"client": client, **_summary(entries, privacy.delta, privacy.accountant, stated=stated)}
        for client, entries in held.items()
    ]
    # of those that trained, as in the statement
    epsilons = [each["epsilon"] for each in clients if each["messages"] and stated] or [0.0]
    told = _so_far(config, held) if statement is None else statement
    facts = {
        "ledger": str(run / LEDGER),
        "level": privacy.level,
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "computed_by": sorted({each["accountant"] for each in clients if each["messages"]}),
        "budget": privacy.epsilon,
        "epsilon_max": max(epsilons) if stated else None,
        "epsilon_median": statistics.median(epsilons) if stated else None,
        "guarantee": told["guarantee"],
        "reasons": told["reasons"],
        "clients": clients,
        "statement": told["statement"],
    }
    return dict(strict_json(facts))


def _so_far(config: RunConfig, held: Mapping[str, Sequence[Entry]]) -> Facts:
    """Return the statement of a run that has left none."""
    charges = {client: [entry.charge for entry in entries] for client, entries in held.items()}
    counts: dict[str, int] = {}
    if level_of(config.privacy).hides_cohort:
        # who they are makes no difference, how many there are is what delta is held against
        everybody = charges.get(EVERYBODY, [])
        charges = {str(client): everybody for client in range(config.federation.clients or 1)}
    elif config.privacy.public_counts:
        # the rate is batch size over rows; of a client whose batch is all it has, there are at most as many
        counts = {
            client: round(config.train.rows_a_step / entries[-1].sample_rate)
            for client, entries in held.items()
            if entries and entries[-1].sample_rate < 1
        }
    return state(config, charges, counts, notes=[UNFINISHED])


def site_spending(file: Path, delta: float = DELTA, accountant: Accountant = "prv") -> Facts:
    """Return what a site spent over all runs in its ledger; see `read_spending`."""
    if not file.is_file():
        raise RunDirectoryError(f"no ledger file '{file}'. A site's own is the one that its `privacy-ledger` names.")
    entries = read_entries(file)
    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        runs.setdefault(entry.run, []).append(entry)
    total = spent([entry.charge for entry in entries], delta, accountant)
    replayable = sum(bool(entry.release) for entry in entries)
    rows = [{"run": run, **_summary(own, delta, accountant)} for run, own in runs.items()]
    reasons = []
    if replayable:
        reasons.append(
            f"{replayable} of {len(entries)} charges are of seeded randomness, which whoever knows the seed can replay"
        )
    facts = {
        "ledger": str(file),
        "delta": delta,
        "accountant": accountant,
        "epsilon": total.epsilon,
        "computed_by": total.accountant,
        "guarantee": not reasons,
        "reasons": reasons,
        "runs": rows,
    }
    return dict(strict_json(facts | {"statement": _site_paragraph(facts, len(runs))}))


def _site_paragraph(facts: Mapping[str, Any], runs: int) -> str:
    sentences = [
        f"Each row that this ledger is for is protected with epsilon = {upwards(facts['epsilon'])} at delta = "
        f"{facts['delta']:g} over all that is in it, {runs} {'run' if runs == 1 else 'runs'}, as though every charge "
        "were on the same rows.",
        *(f"No guarantee: {reason}." for reason in facts["reasons"]),
        f"Accountant: {COMPUTED[facts['computed_by']]}.",
        "Assumed: rows were drawn and noise was added as the runs' own statements (privacy.json) say, nothing else was "
        "released of these rows, and no other ledger holds charges on them.",
    ]
    return " ".join(sentences)


def _summary(entries: Sequence[Entry], delta: float, accountant: Accountant, *, stated: bool = True) -> Facts:
    """Return what some entries come to; ranges as the least and the most."""
    total = spent([entry.charge for entry in entries], delta, accountant)
    facts: Facts = {
        "epsilon": total.epsilon if stated else None,
        "accountant": total.accountant,
        **dict.fromkeys(("noise_multiplier", "sample_rate", "rounds")),
        "steps": sum(entry.steps for entry in entries),
        "messages": len(entries),
    }
    if entries:
        for key, name in (
            ("noise_multiplier", "noise_multiplier"),
            ("sample_rate", "sample_rate"),
            ("rounds", "round"),
        ):
            values = [getattr(entry, name) for entry in entries]
            facts[key] = [min(values), max(values)]
    return facts
