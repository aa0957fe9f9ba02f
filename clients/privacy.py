"""What stands between a message and a client's rows under record-level privacy: books, budgets, and the site's word.

On a SuperNode the site keeps its own ledger, across runs and restarts: the file that ``privacy-ledger`` of the node's
configuration names. There is no other: a server may ask for other cuts of the same rows, and rows may be added or
corrected, but what was spent on the old ones is spent. In a simulation the driver keeps the books, and says so in this
very process (`fedpeft.clients.verdicts`): neither a site's configuration nor a server can.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast, get_args

from flwr.app import Context
from torch import Tensor

from fedpeft.adapters.state import PrivacyClaim, fingerprint
from fedpeft.clients.received import fingerprint_of
from fedpeft.clients.rows import DATA, ClientRows
from fedpeft.clients.verdicts import is_simulated, verdict
from fedpeft.config import DataConfig, RunConfig, Scalar
from fedpeft.config.privacy import Accountant, PrivacyConfig
from fedpeft.data.sources import digest, locate
from fedpeft.errors import DeploymentError, nearest
from fedpeft.privacy.budget import Budget, Limit, charged
from fedpeft.privacy.checks import check_privacy
from fedpeft.privacy.ledger import Entry, Ledger
from fedpeft.privacy.levels import LEVELS, level_of
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import Randomness, secure, seeded
from fedpeft.privacy.statement import void
from fedpeft.resident import Resident
from fedpeft.wire import TrainOrder, to_tensors

# keys of a site's own configuration
LEDGER_FILE, SITE_EPSILON, SITE_DELTA = "privacy-ledger", "privacy-epsilon", "privacy-delta"
SITE_ACCOUNTANT = "privacy-accountant"
DEFAULT_DELTA = 1e-5  # of a site's own budget, whatever a run says
KEYS = (LEDGER_FILE, SITE_EPSILON, SITE_DELTA, SITE_ACCOUNTANT)
OURS = ("privacy", "noise")  # beginnings of keys that are about this, so that unknown ones are mistakes
ALIKE = 0.85  # so near to one of the keys that it must be meant

log = logging.getLogger(__name__)


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
    claim : PrivacyClaim or None
        What the server is told that it costs; nothing where it may not know how many rows there are.
    """

    mechanism: RecordMechanism
    randomness: Randomness
    claim: PrivacyClaim | None


def permit(
    order: TrainOrder, context: Context, home: Resident, rows: ClientRows, config: RunConfig
) -> Permission | None:
    """Charge an order's training, before it begins; None where the budget does not allow it.

    Raises
    ------
    ConfigError
        Something of the run would leak around the mechanism.
    LedgerError
        The books cannot be kept.
    PrivacyError
        No noise meets the run's budget.
    """
    privacy, node, decided = config.privacy, context.node_config, verdict()
    check_privacy(config)
    if decided is not None and not decided.allowed:
        return None
    mechanism = level_of(privacy).client_mechanism(
        config, rows.num_examples, noise_multiplier=None if decided is None else decided.noise_multiplier
    )
    is_seeded = privacy.rng == "seeded"
    steps = mechanism.steps
    if decided is None:
        ledger = _named_ledger(node)  # also of a simulation without a driver that keeps books
        if rows.num_examples * privacy.delta >= 1:
            log.warning(
                "privacy.delta = %g is not below 1/n for the %d rows here: releasing a row in the clear would satisfy "
                "it",
                privacy.delta,
                rows.num_examples,
            )
        data = data_fingerprint(home, rows, node)
        claimed = 0.0 if void(privacy) else mechanism.noise_multiplier  # what is void must not look sound afterwards
        entry = Entry(
            run=str(context.run_id),
            client=rows.client_id,
            round=order.server_round,
            noise_multiplier=claimed,
            sample_rate=mechanism.sample_rate,
            steps=mechanism.steps,
            release=release(order, context, config, data) if is_seeded else "",
            data=data,
        )
        if not charged(ledger, entry, _limits(privacy, node, entry.run)):
            return None
        steps = sum(entry.steps for entry in ledger.entries(rows.client_id, entry.run))
    claim = PrivacyClaim(mechanism.noise_multiplier, mechanism.sample_rate, steps)
    purpose = ("record privacy", order.server_round, rows.client_id)
    randomness = seeded(config.run.seed, *purpose) if is_seeded else secure()
    return Permission(mechanism, randomness, claim if privacy.public_counts else None)


def check_site(config: RunConfig, node: Mapping[str, Scalar]) -> None:
    """Hold a run to what a site demands: with a budget of its own, it trains under record-level privacy alone.

    Called before anything is done with rows. What it says depends on configurations alone, and may be told.

    Raises
    ------
    SitePolicyError
        The run does not keep to it, or the site's own configuration is no policy.
    """
    if unknown := [key for key in node if key not in KEYS and _is_meant(key)]:
        raise SitePolicyError(f"'{unknown[0]}' in the node's configuration. {nearest(unknown[0], KEYS)}")
    if SITE_EPSILON not in node:
        for key in (SITE_DELTA, SITE_ACCOUNTANT):
            if key in node:
                raise SitePolicyError(f"{key} in the node's configuration does nothing without {SITE_EPSILON}.")
        _check_deployed(config, node)
        return
    if not _names_ledger(node):
        raise SitePolicyError(
            f"{SITE_EPSILON} in the node's configuration needs {LEDGER_FILE}, a file that is kept: without it, "
            "rows that are cut or stored otherwise would open a new account."
        )
    _check_deployed(config, node)
    _site_budget(node)
    privacy = config.privacy
    given = {
        "privacy.level": (privacy.level, next(name for name, level in LEVELS.items() if level.clients_add_noise)),
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


@lru_cache(maxsize=1024)  # asked for each key at every message
def _is_meant(key: str) -> bool:
    """Tell whether a key is about privacy, be it misspelt."""
    plain = key.strip().casefold().replace("_", "-")
    return plain.startswith(OURS) or bool(difflib.get_close_matches(plain, KEYS, n=1, cutoff=ALIKE))


def _is_same_place(one: str, other: str) -> bool:
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def _names_ledger(node: Mapping[str, Scalar]) -> bool:
    return bool(str(node.get(LEDGER_FILE, "")).strip())


def _check_deployed(config: RunConfig, node: Mapping[str, Scalar]) -> None:
    """Refuse what only a simulation's driver could answer for."""
    if is_simulated():
        return
    if level_of(config.privacy).clients_add_noise:
        _named_ledger(node)
        public = config.adapter.init_data
        if public is not None and DATA in node and _is_same_place(public, str(node[DATA])):
            raise SitePolicyError(
                f"adapter.init_data = '{public}' is this site's own rows, which are not public: no noise covers what "
                "an adapter begins at. Name other rows, or take another adapter.init."
            )
    if config.privacy.canaries:
        raise SitePolicyError(
            f"privacy.canaries = {config.privacy.canaries} would plant false rows among a site's own; canaries are for "
            "simulations."
        )


def note_open_training(order: TrainOrder, context: Context, rows: ClientRows, steps: int) -> None:
    """Write into a ledger that the site has named that rows were trained on without noise."""
    node = context.node_config
    if not _names_ledger(node):
        return
    run, client = str(context.run_id), rows.client_id
    _named_ledger(node).charge(
        Entry(run, client, order.server_round, noise_multiplier=0.0, sample_rate=1.0, steps=steps)
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
    total = hashlib.sha256(digest(place, DataConfig()).encode())
    if own is None:
        total.update(rows.indices.astype("<i8").tobytes())
    return total.hexdigest()


def release(order: TrainOrder, context: Context, config: RunConfig, data: str) -> str:
    """Return the hash of all that a seeded training follows from: who repeats it computes the same numbers.

    Parameters
    ----------
    order : TrainOrder
        All of it counts.
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
    settings = sorted(order.config_record().items())
    parts = [fingerprint_of(order.arrays), fingerprint(kept), repr(settings), config.to_toml(), data]
    if order.control is not None:
        parts.append(fingerprint(to_tensors(order.control)))
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _named_ledger(node: Mapping[str, Scalar]) -> Ledger:
    if not _names_ledger(node):
        raise SitePolicyError(
            f"this site names no ledger, and trains under privacy.level = 'record' with one only. On its machine: "
            f"`fedpeft privacy ledger --create /path/ledger.jsonl`, then --node-config "
            f"'{LEDGER_FILE}=\"/path/ledger.jsonl\"', one for all runs on the same rows."
        )
    return Ledger(Path(str(node[LEDGER_FILE])), "site")


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
