"""What stands between a message and a client's rows under record-level privacy: books, budgets, and the site's word.

On a SuperNode the site keeps its own ledger, across runs and restarts: the file that ``privacy-ledger`` of the node's
configuration names, else one named by the fingerprint of its rows as they lie on disk. A site that sets a budget of its
own must name the file, since a server may ask for other cuts of the same rows, and rows may be added or corrected: what
was spent on the old ones is spent. In a simulation the driver keeps the books, and says so in the configuration that it
hands to the client; a server's messages cannot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import platformdirs
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor

from fedpeft.clients.rows import DATA, ClientRows
from fedpeft.config import DataConfig, RunConfig, Scalar
from fedpeft.data.sources import digest, locate
from fedpeft.errors import DeploymentError, nearest
from fedpeft.privacy.budget import Budget, Limit, charged
from fedpeft.privacy.checks import check_privacy
from fedpeft.privacy.ledger import Entry, Ledger
from fedpeft.privacy.mechanism import RecordMechanism, record_mechanism
from fedpeft.privacy.randomness import Randomness, secure, seeded
from fedpeft.privacy.settings import Accountant, PrivacyConfig
from fedpeft.privacy.statement import void
from fedpeft.resident import Resident
from fedpeft.state import fingerprint
from fedpeft.wire import ARRAYS, CONFIG, NOISE_MULTIPLIER, ROUND, SAMPLE_RATE, SPENT_STEPS, to_tensors

# keys of a site's own configuration
LEDGER_FILE, SITE_EPSILON, SITE_DELTA = "privacy-ledger", "privacy-epsilon", "privacy-delta"
SITE_ACCOUNTANT = "privacy-accountant"
DEFAULT_DELTA = 1e-5  # of a site's own budget, whatever a run says
# what a simulation's driver adds to it for one message
BOOKS, CHARGED, EXHAUSTED = "privacy-books", "charged", "exhausted"
KEYS = (LEDGER_FILE, SITE_EPSILON, SITE_DELTA, SITE_ACCOUNTANT, BOOKS)


class SitePolicyError(DeploymentError):
    """A run that does not keep to what a site demands; depends on the run's configuration, and on no row."""


@dataclass(frozen=True)
class Permission:
    """That a client may train, and how.

    Parameters
    ----------
    mechanism : RecordMechanism
        What to do to gradients.
    randomness : Randomness
        Where batches and noise come from.
    told : mapping of str to float
        What the server is told of it, by keys of `fedpeft.wire`.
    """

    mechanism: RecordMechanism
    randomness: Randomness
    told: Mapping[str, float]


def permit(
    message: Message, context: Context, home: Resident, rows: ClientRows, config: RunConfig
) -> Permission | None:
    """Charge a message's training, before it begins; None where the budget does not allow it.

    Raises
    ------
    ConfigError
        Something of the run would leak around the mechanism.
    LedgerError
        The books cannot be kept.
    PrivacyError
        No noise meets the run's budget.
    """
    privacy, node = config.privacy, context.node_config
    check_privacy(config)
    if node.get(BOOKS) == EXHAUSTED:
        return None
    mechanism = record_mechanism(config, rows.num_examples, noise_multiplier=_float(node.get(NOISE_MULTIPLIER)))
    server_round = int(message.content.config_records[CONFIG][ROUND])  # type: ignore[arg-type]
    is_seeded = privacy.rng == "seeded"
    steps = mechanism.steps
    if node.get(BOOKS) != CHARGED:
        data = data_fingerprint(home, rows, node)
        ledger = Ledger(_ledger_file(data, node))
        claimed = 0.0 if void(privacy) else mechanism.noise_multiplier  # what is void must not look sound afterwards
        entry = Entry(
            run=str(context.run_id),
            client=rows.client_id,
            round=server_round,
            noise_multiplier=claimed,
            sample_rate=mechanism.sample_rate,
            steps=mechanism.steps,
            release=release(message, context, config, data) if is_seeded else "",
            data=data,
        )
        if not charged(ledger, entry, _limits(privacy, node, entry.run)):
            return None
        steps = sum(entry.steps for entry in ledger.entries(rows.client_id, entry.run))
    told = {NOISE_MULTIPLIER: mechanism.noise_multiplier, SAMPLE_RATE: mechanism.sample_rate, SPENT_STEPS: steps}
    purpose = ("record privacy", server_round, rows.client_id)
    randomness = seeded(config.run.seed, *purpose) if is_seeded else secure()
    return Permission(mechanism, randomness, told if privacy.public_counts else {})


def check_site(config: RunConfig, node: Mapping[str, Scalar]) -> None:
    """Hold a run to what a site demands: with a budget of its own, it trains under record-level privacy alone.

    Called before anything is done with rows.

    Raises
    ------
    SitePolicyError
        The run does not keep to it, or the site's own configuration is no policy.
    """
    if unknown := [key for key in node if key.startswith("privacy") and key not in KEYS]:
        raise SitePolicyError(f"'{unknown[0]}' in the node's configuration. {nearest(unknown[0], KEYS[:-1])}")
    if SITE_EPSILON not in node:
        for key in (SITE_DELTA, SITE_ACCOUNTANT):
            if key in node:
                raise SitePolicyError(f"{key} in the node's configuration does nothing without {SITE_EPSILON}.")
        return
    if LEDGER_FILE not in node:
        raise SitePolicyError(
            f"{SITE_EPSILON} in the node's configuration needs {LEDGER_FILE}, a file that is kept: without it, "
            "rows that are cut or stored otherwise would open a new account."
        )
    _site_budget(node)
    privacy = config.privacy
    given = {
        "privacy.level": (privacy.level, "record"),
        "privacy.rng": (privacy.rng or "secure", "secure"),
        "privacy.sampling": (privacy.sampling, "poisson"),
        "privacy.release_metrics": (privacy.release_metrics, False),
        # a server could name private rows as public ones
        "adapter.init_data": (config.adapter.init_data, None),
    }
    for key, (value, wanted) in given.items():
        if value != wanted:
            raise SitePolicyError(
                f"this site has a privacy budget ({SITE_EPSILON} = {node[SITE_EPSILON]}) and trains with "
                f"{key} = {wanted} only; the run has {value}."
            )


def note_open_training(message: Message, context: Context, rows: ClientRows, steps: int) -> None:
    """Write into a ledger that the site has named that rows were trained on without noise."""
    node = context.node_config
    if LEDGER_FILE not in node:
        return
    server_round = int(message.content.config_records[CONFIG][ROUND])  # type: ignore[arg-type]
    Ledger(_ledger_file("", node)).charge(
        Entry(str(context.run_id), rows.client_id, server_round, noise_multiplier=0.0, sample_rate=1.0, steps=steps)
    )


def data_fingerprint(home: Resident, rows: ClientRows, node: Mapping[str, Scalar]) -> str:
    """Return a hash of the rows as they lie on disk; of a share of common rows, also of which they are.

    Parameters
    ----------
    home : Resident
        Names the common rows.
    rows : ClientRows
        Which rows.
    node : mapping
        The node's own configuration.
    """
    own = node.get(DATA)
    place = locate(home.config.data.source if own is None else Path(str(own)).expanduser()).train
    # as plain files, so that neither columns nor task of the run make a difference
    total = hashlib.sha256(digest(place, DataConfig(), "sequence-classification").encode())
    if own is None:
        total.update(rows.indices.astype("<i8").tobytes())
    return total.hexdigest()


def release(message: Message, context: Context, config: RunConfig, data: str) -> str:
    """Return the hash of all that a seeded training follows from: who repeats it computes the same numbers.

    Parameters
    ----------
    message : Message
        Its arrays and settings.
    context : Context
        What the client kept from earlier rounds.
    config : RunConfig
        Seed and settings of the run.
    data : str
        Fingerprint of the rows.
    """
    kept: dict[str, Tensor] = {}
    for name, record in context.state.array_records.items():
        kept |= {f"{name}/{key}": tensor for key, tensor in to_tensors(record).items()}
    settings = sorted(message.content.config_records[CONFIG].items())
    sent = _hash_of_arrays(message.content.array_records[ARRAYS])
    parts = [sent, fingerprint(kept), repr(settings), config.to_toml(), data]
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


_last: tuple[ArrayRecord, str] | None = None


def _hash_of_arrays(record: ArrayRecord) -> str:
    """Hash what is sent once for all clients of a round that are sent the same object."""
    global _last
    if _last is None or _last[0] is not record:
        _last = (record, fingerprint(to_tensors(record)))
    return _last[1]


def _ledger_file(data: str, node: Mapping[str, Scalar]) -> Path:
    named = node.get(LEDGER_FILE)
    if named is not None:
        return Path(str(named)).expanduser()
    return platformdirs.user_data_path("fedpeft") / "ledgers" / f"{data[:40]}.jsonl"


def _limits(privacy: PrivacyConfig, node: Mapping[str, Scalar], run: str) -> list[Limit]:
    """Return the run's own budget and the site's; without the latter, the run's holds for ALL that is in the ledger."""
    own = None if void(privacy) else Budget.of(privacy)
    if SITE_EPSILON not in node:
        return [] if own is None else [Limit(own)]
    return [Limit(_site_budget(node)), *([] if own is None else [Limit(own, run=run)])]


def _site_budget(node: Mapping[str, Scalar]) -> Budget:
    """Read a site's budget, of which nothing is left to the server."""
    epsilon, delta = _float(node[SITE_EPSILON]), _float(node.get(SITE_DELTA, DEFAULT_DELTA))
    accountant = node.get(SITE_ACCOUNTANT, "prv")
    if (
        epsilon is None
        or delta is None
        or not (epsilon > 0 and 0 < delta < 1)
        or accountant not in get_args(Accountant)
    ):
        raise SitePolicyError(
            f"{SITE_EPSILON} = {node[SITE_EPSILON]}, {SITE_DELTA} = {node.get(SITE_DELTA, DEFAULT_DELTA)}, "
            f"{SITE_ACCOUNTANT} = {accountant} in the node's configuration: epsilon must be above 0, delta between "
            f"0 and 1, and the accountant one of {', '.join(get_args(Accountant))}."
        )
    return Budget(epsilon, delta, cast(Accountant, accountant))


def _float(value: Scalar | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
