"""What stands between a message and a client's rows under record-level privacy: the books, the budget, the site's word.

On a SuperNode the site keeps its own ledger, across runs and restarts, in a file named by the fingerprint of its rows
as they lie on disk (so that another tokenizer opens no new account), or in the file that ``privacy-ledger`` of the
node's configuration names: name one where rows are added or corrected from time to time, for what was spent on the old
rows is spent. In a simulation the driver keeps the books, and says so in the configuration that it hands to the client;
a server's messages cannot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor

from fedpeft.clients.rows import DATA, ClientRows
from fedpeft.config import RunConfig, Scalar
from fedpeft.data.sources import digest, locate
from fedpeft.errors import ConfigError, DeploymentError
from fedpeft.privacy.budget import Budget, charged
from fedpeft.privacy.ledger import Entry, Ledger
from fedpeft.privacy.mechanism import RecordMechanism, record_mechanism
from fedpeft.privacy.randomness import Randomness, secure, seeded
from fedpeft.privacy.settings import PrivacyConfig
from fedpeft.resident import Resident
from fedpeft.state import fingerprint
from fedpeft.wire import ARRAYS, CONFIG, NOISE_MULTIPLIER, ROUND, SAMPLE_RATE, SPENT_STEPS, to_tensors

# keys of a site's own configuration
LEDGER_FILE, SITE_EPSILON, SITE_DELTA = "privacy-ledger", "privacy-epsilon", "privacy-delta"
# what a simulation's driver adds to it for one message
BOOKS, CHARGED, EXHAUSTED = "privacy-books", "charged", "exhausted"


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
    DeploymentError
        The site asks for more privacy than the run offers.
    LedgerError
        The books cannot be kept.
    PrivacyError
        No noise meets the run's budget.
    """
    privacy, node = config.privacy, context.node_config
    check_site(config, node)
    if node.get(BOOKS) == EXHAUSTED:
        return None
    mechanism = record_mechanism(config, rows.num_examples, noise_multiplier=_float(node.get(NOISE_MULTIPLIER)))
    server_round = int(message.content.config_records[CONFIG][ROUND])  # type: ignore[arg-type]
    is_seeded = privacy.rng == "seeded"
    steps = mechanism.steps
    if node.get(BOOKS) != CHARGED:
        data = data_fingerprint(home, rows, node)
        ledger = Ledger(_ledger_file(data, node))
        entry = Entry(
            run=str(context.run_id),
            client=rows.client_id,
            round=server_round,
            noise_multiplier=mechanism.noise_multiplier,
            sample_rate=mechanism.sample_rate,
            steps=mechanism.steps,
            release=release(message, context, config, data) if is_seeded else "",
            data=data,
        )
        if not charged(ledger, entry, _budget(privacy, node)):
            return None
        steps = sum(entry.steps for entry in ledger.entries(rows.client_id, str(context.run_id)))
    told = {NOISE_MULTIPLIER: mechanism.noise_multiplier, SAMPLE_RATE: mechanism.sample_rate, SPENT_STEPS: steps}
    purpose = ("record privacy", server_round, rows.client_id)
    randomness = seeded(config.run.seed, *purpose) if is_seeded else secure()
    return Permission(mechanism, randomness, told if privacy.public_counts else {})


def check_site(config: RunConfig, node: Mapping[str, Scalar]) -> None:
    """Hold a run to what a site demands: with a budget of its own, it trains under record-level privacy alone.

    Raises
    ------
    DeploymentError
        The run does not keep to it.
    """
    if SITE_EPSILON not in node:
        return
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
            raise DeploymentError(
                f"this site has a privacy budget ({SITE_EPSILON} = {node[SITE_EPSILON]}) and trains with "
                f"{key} = {wanted} only; the run has {value}."
            )


def data_fingerprint(home: Resident, rows: ClientRows, node: Mapping[str, Scalar]) -> str:
    """Return a hash of the rows as they lie on disk, which no choice of the server's changes.

    Parameters
    ----------
    home : Resident
        Names columns and task, which tell what files belong to the rows.
    rows : ClientRows
        Which rows.
    node : mapping
        The node's own configuration.
    """
    config = home.config
    own = node.get(DATA)
    place = locate(config.data.source if own is None else Path(str(own)).expanduser()).train
    total = hashlib.sha256(digest(place, config.data, config.task).encode())
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


def _budget(privacy: PrivacyConfig, node: Mapping[str, Scalar]) -> Budget | None:
    """Return the site's own budget, else the run's; either holds for ALL that is in the ledger."""
    if SITE_EPSILON not in node:
        return Budget.of(privacy)
    epsilon, delta = _float(node[SITE_EPSILON]), _float(node.get(SITE_DELTA, privacy.delta))
    if epsilon is None or delta is None or not (epsilon > 0 and 0 < delta < 1):
        raise ConfigError(
            f"{SITE_EPSILON} = {node[SITE_EPSILON]} and {SITE_DELTA} = {node.get(SITE_DELTA)} in the node's "
            "configuration: epsilon must be above 0, and delta between 0 and 1."
        )
    return Budget(epsilon, delta, privacy.accountant)


def _float(value: Scalar | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
