"""Whose rows a node trains on: its share of a common data set, or a file of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpeft import tasks
from fedpeft.config import Scalar
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import DeploymentError
from fedpeft.privacy.canaries import canaries_of
from fedpeft.privacy.levels import find_level
from fedpeft.resident import Resident
from fedpeft.tasks.encoding import encode_rows
from fedpeft.tasks.tolerant import encode_what_can_be

PARTITION_ID, NUM_PARTITIONS, DATA, NODE_CLIENT_ID = "partition-id", "num-partitions", "data", "client-id"

log = logging.getLogger(__name__)  # of the site; it never leaves it


@dataclass(frozen=True)
class ClientRows:
    """One client's rows.

    Parameters
    ----------
    client_id : str
        Stable name of the client.
    split : EncodedSplit
        The encoded rows.
    indices : array of int64, shape (n,)
        Which of them are the client's.
    left_out : int
        Rows that count as the client's but are in no batch: canaries that a coin has left out, and rows that cannot be
        encoded under record-level privacy. A row that is drawn with a gradient of zero moves no sum either.
    """

    client_id: str
    split: EncodedSplit
    indices: NDArray[np.int64]
    left_out: int = 0

    @property
    def num_examples(self) -> int:
        """The client's public number of rows: its weight, and what its sample rate refers to."""
        return len(self.indices) + self.left_out


def client_rows(home: Resident, node_config: Mapping[str, Scalar]) -> ClientRows:
    """Find a node's rows by what its ``--node-config`` says.

    Parameters
    ----------
    home : Resident
        The process's model and rows.
    node_config : mapping
        ``data`` (a file of this site; ``client-id`` names the client, the file's stem if unset), or ``partition-id``
        and ``num-partitions``.

    Raises
    ------
    DeploymentError
        Neither is given, or the number of partitions is not that of the configuration, or a run with canaries meets a
        site's own rows.
    """
    if DATA in node_config:
        if home.key.canaries:
            raise DeploymentError(
                f"privacy.canaries = {home.key.canaries} would plant false rows among a site's own; "
                "canaries are for simulations."
            )
        split, left_out = home.once(_own_rows, Path(str(node_config[DATA])).expanduser())
        return ClientRows(site_name(node_config) or "", split, np.arange(len(split), dtype=np.int64), left_out)
    if PARTITION_ID not in node_config or NUM_PARTITIONS not in node_config:
        raise DeploymentError(
            "this node does not know its rows: start it with --node-config 'data=\"/path/rows.csv\"', "
            "or 'partition-id=0 num-partitions=3'."
        )
    index, count = int(node_config[PARTITION_ID]), int(node_config[NUM_PARTITIONS])
    partition = home.partition
    if count != len(partition.client_ids):
        raise DeploymentError(
            f"num-partitions = {count}, but the run divides its rows among {len(partition.client_ids)} clients; "
            "start every node with that number."
        )
    if not 0 <= index < count:
        raise DeploymentError(f"partition-id = {index} is not in 0 .. {count - 1}")
    client, own = partition.client_ids[index], partition.indices[index]
    canaries = canaries_of(home)
    if canaries is None:
        return ClientRows(client, home.data.train, own)
    planted, left_out = canaries.of(index)
    return ClientRows(client, canaries.split, np.concatenate([own, planted]), left_out)


def site_name(node_config: Mapping[str, Scalar]) -> str | None:
    """Return the name of a client with rows of its own; None where it has a share of common ones."""
    if DATA not in node_config:
        return None
    return str(node_config.get(NODE_CLIENT_ID, Path(str(node_config[DATA])).expanduser().stem))


def _own_rows(home: Resident, path: Path) -> tuple[EncodedSplit, int]:
    """Encode a site's rows; also return how many cannot be.

    There must be none, unless clients add noise: a failure then is an answer about a row that has none.
    """
    labels = home.config.data.label_names
    if labels is None and tasks.of(home.config).has_labels:
        raise DeploymentError(
            "a site with rows of its own needs data.labels, the comma-separated names of all labels: "
            "its own rows may not hold every one."
        )
    if find_level(home.key.level).clients_add_noise:
        split, problems = encode_what_can_be(home.config, home.folder, path, labels or ())
    else:
        split, problems = encode_rows(home.config, home.folder, path, labels or ()), dict[int, str]()
    for note in split.notes:
        log.info("%s", note)
    for caution in split.cautions:
        log.warning("%s", caution)
    for row, what in problems.items():
        log.warning("row %d of '%s' cannot be encoded and counts as one with a gradient of zero: %s", row, path, what)
    return split, len(problems)
