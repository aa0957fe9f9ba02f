"""Who holds what: training rows divided among clients, each row to exactly one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import RunConfig
from fedpeft.data.schemes import BY_LABEL, Rows, divide
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import PartitionError
from fedpeft.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class Partition:
    """A division of the training rows.

    Parameters
    ----------
    client_ids : tuple of str
        Names of the clients.
    indices : tuple of array of int64
        Each client's rows, ascending.
    """

    client_ids: tuple[str, ...]
    indices: tuple[Rows, ...]

    def label_counts(self, labels: Any, num_labels: int) -> NDArray[np.int64]:
        """Return how many rows of each label each client holds, shape ``(clients, num_labels)``.

        Parameters
        ----------
        labels : array or Tensor of int, shape (n,)
            Label ids of all training rows.
        num_labels : int
            Number of labels.
        """
        ids = np.asarray(labels)
        return np.stack([np.bincount(ids[rows], minlength=num_labels) for rows in self.indices]).astype(np.int64)


def partition(config: RunConfig, train: EncodedSplit) -> Partition:
    """Divide the training rows as configured.

    Parameters
    ----------
    config : RunConfig
        Scheme, number of clients and seed.
    train : EncodedSplit
        The rows.

    Raises
    ------
    PartitionError
        The scheme does not fit the rows or the number of clients, or leaves a client with too few rows.
    """
    scheme = config.partition.scheme
    if scheme == "natural":
        client_ids, parts = _natural(config, train)
    else:
        count = _num_clients(config, len(train))
        client_ids = tuple(str(index) for index in range(count))
        labels = None if train.labels is None else train.labels.numpy()
        if scheme in BY_LABEL and labels is None:
            raise PartitionError(
                f"partition.scheme = '{scheme}' divides rows by their labels, which {train.task} rows do not have. "
                "Use iid, linear, square, exponential, domain (with data.domain) or natural (with partition.by)."
            )
        if scheme == "domain":
            parts = _domain(config, train, count, labels)
        else:
            parts = divide(config, scheme, count, len(train), labels, derive_seed(config.run.seed, "partition"))
    indices = tuple(np.sort(np.asarray(part, dtype=np.int64)) for part in parts)
    for client, rows in zip(client_ids, indices, strict=True):
        if len(rows) < config.partition.min_examples:
            raise PartitionError(
                f"client '{client}' would hold {len(rows)} of {len(train)} rows with partition.scheme = "
                f"'{scheme}', fewer than partition.min_examples = {config.partition.min_examples}. "
                "Use fewer clients or another scheme."
            )
    assert np.array_equal(np.sort(np.concatenate(indices)), np.arange(len(train)))
    return Partition(client_ids, indices)


def _num_clients(config: RunConfig, rows: int) -> int:
    count = config.federation.clients
    if count is None:
        raise PartitionError(
            f"partition.scheme = '{config.partition.scheme}' needs the number of clients. Give federation.clients."
        )
    if count > rows:
        raise PartitionError(
            f"federation.clients = {count}, but there are {rows} training rows. Use at most {rows} clients."
        )
    return count


def _natural(config: RunConfig, train: EncodedSplit) -> tuple[tuple[str, ...], list[Rows]]:
    """Make each value of a column a client."""
    if train.clients is None:
        raise PartitionError(
            f"the training rows do not have the column partition.by = '{config.partition.by}'. Name one they have."
        )
    client_ids, parts = _groups(train.clients)
    given = config.federation.clients
    if given is not None and given != len(client_ids):
        raise PartitionError(
            f"federation.clients = {given}, but the column partition.by = '{config.partition.by}' has "
            f"{len(client_ids)} values, each a client. Leave federation.clients unset."
        )
    return client_ids, parts


def _groups(values: Sequence[str]) -> tuple[tuple[str, ...], list[Rows]]:
    """Return the distinct values, by number if all are whole numbers, else alphabetically, and the rows of each."""
    names, codes = np.unique(np.asarray(values), return_inverse=True)
    plain = [str(name) for name in names]
    ordered = sorted(plain, key=lambda name: (int(name), name)) if all(map(str.isdecimal, plain)) else plain
    place = {name: index for index, name in enumerate(plain)}
    return tuple(ordered), [np.flatnonzero(codes == place[name]) for name in ordered]


def _domain(config: RunConfig, train: EncodedSplit, count: int, labels: Rows | None) -> list[Rows]:
    """Give each client rows of one domain, or, with fewer clients than domains, some whole domains.

    Client i belongs to domain i mod D. Its clients share a domain's rows evenly, or by Dirichlet over labels where
    `partition.alpha` was given.
    """
    if train.domains is None:
        raise PartitionError("partition.scheme = 'domain' needs data.domain, the column that names each row's domain.")
    names, groups = _groups(train.domains)
    if count < len(groups):
        return [np.concatenate(groups[client::count]) for client in range(count)]
    given = config.partition.alpha is not None
    parts: list[Rows] = [np.empty(0, dtype=np.int64)] * count
    for number, (name, rows) in enumerate(zip(names, groups, strict=True)):
        clients = range(number, count, len(groups))
        if len(clients) > len(rows):
            raise PartitionError(
                f"domain '{name}' has {len(rows)} training rows for {len(clients)} clients. "
                f"Use at most {len(groups) * len(rows)} clients."
            )
        seed = derive_seed(config.run.seed, "partition", name)
        scheme = "dirichlet" if given and labels is not None else "iid"
        labels_there = None if labels is None else labels[rows]
        for client, chosen in zip(
            clients, divide(config, scheme, len(clients), len(rows), labels_there, seed), strict=True
        ):
            parts[client] = rows[chosen]
    return parts


def partition_table(partition: Partition, train: EncodedSplit, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return a partition as plain data.

    Parameters
    ----------
    partition : Partition
        The partition.
    train : EncodedSplit
        The rows that it divides.
    labels : sequence of str
        Label names in the order of their ids.

    Returns
    -------
    list of dict
        One a client: ``client``, ``rows``, and ``labels`` and ``domains`` (name to number of rows) where there are any.
    """
    counted = {name: (names, counts) for name, names, counts in counts_by_value(partition, train, labels)}
    return [
        {"client": client, "rows": len(rows)}
        | {name: dict(zip(names, counts[index].tolist(), strict=True)) for name, (names, counts) in counted.items()}
        for index, (client, rows) in enumerate(zip(partition.client_ids, partition.indices, strict=True))
    ]


def counts_by_value(
    partition: Partition, train: EncodedSplit, labels: Sequence[str]
) -> list[tuple[str, tuple[str, ...], NDArray[np.int64]]]:
    """Return what rows can be counted by: its name, its values, and the rows of each by client, (clients, values)."""
    counted = []
    if train.labels is not None:
        counted.append(("labels", tuple(labels), partition.label_counts(train.labels, len(labels))))
    if train.domains is not None:
        names, groups = _groups(train.domains)
        codes = np.empty(len(train), dtype=np.int64)
        for code, rows in enumerate(groups):
            codes[rows] = code
        counted.append(("domains", names, partition.label_counts(codes, len(names))))
    return counted
