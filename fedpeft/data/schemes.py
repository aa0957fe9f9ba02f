"""Flower's partitioning schemes, run on a column of row numbers with the run's seed, no row left out.

Where one of them would leave rows out (shards that do not come out even, labels that no client drew), these are dealt
here.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpeft.config import RunConfig
from fedpeft.errors import PartitionError
from fedpeft.seeds import derive_seed, generator

Rows = NDArray[np.int64]

BY_LABEL = ("dirichlet", "pathological", "shard")
# Flower gives up after ten draws; ten times as many cost little, and let skewed divisions among many clients succeed
DIRICHLET_ATTEMPTS = 10


def partitioners() -> Any:
    """Import Flower's partitioners, and not the plots that their package brings along.

    These import seaborn and scipy.stats: 1.4 seconds, in the driver and in every worker. Whoever imports
    ``flwr_datasets.visualization`` afterwards gets it.
    """
    plots = "flwr_datasets.visualization"
    known = plots in sys.modules
    if not known:
        sys.modules[plots] = types.ModuleType(plots)
    try:
        return importlib.import_module("flwr_datasets.partitioner")
    finally:
        if not known:
            del sys.modules[plots]


def divide(config: RunConfig, scheme: str, count: int, rows: int, labels: Rows | None, seed: int) -> list[Rows]:
    """Divide rows by one of Flower's schemes.

    Parameters
    ----------
    config : RunConfig
        The scheme's settings.
    scheme : str
        Its name.
    count : int
        Number of clients.
    rows : int
        Number n of rows.
    labels : array of int64, shape (n,), optional
        Label ids, for the schemes in `BY_LABEL`.
    seed : int
        What is drawn follows from it.

    Returns
    -------
    list of array of int64
        Each client's row numbers, in no order; each of 0 .. n - 1 occurs once.

    Raises
    ------
    PartitionError
        Settings, rows and clients do not go together.
    """
    flower = partitioners()
    order = generator(seed, "order").permutation(rows)  # Flower's schemes take rows as they come
    if scheme in BY_LABEL:
        assert labels is not None
        if scheme == "shard":
            by_label = order[np.argsort(labels[order], kind="stable")]
            return _shard(config.partition.shards_per_client, count, by_label, seed)
        deal = {"dirichlet": _dirichlet, "pathological": _pathological}[scheme]
        return [order[part] for part in deal(config, count, labels[order], seed)]
    sized: dict[str, Callable[[], Any]] = {
        "iid": lambda: flower.IidPartitioner(num_partitions=count),
        "linear": lambda: flower.LinearPartitioner(num_partitions=count),
        "square": lambda: flower.SquarePartitioner(num_partitions=count),
        "exponential": lambda: flower.ExponentialPartitioner(num_partitions=count),
    }
    try:
        return _deal(sized[scheme](), order, np.zeros(rows, dtype=np.int64), count)
    except ValueError:
        raise PartitionError(
            f"partition.scheme = '{scheme}' leaves some of {count} clients without any of the {rows} rows. "
            "Use fewer clients or another scheme."
        ) from None


class _Columns(datasets.Dataset):  # type: ignore[misc]
    """A table whose columns are read whole: Flower's schemes would read the labels cell by cell."""

    def __getitem__(self, key: Any) -> Any:
        return self.data.column(key).to_numpy() if isinstance(key, str) else super().__getitem__(key)


def _deal(partitioner: Any, rows: Rows, labels: Rows, count: int) -> list[Rows]:
    """Run one of Flower's partitioners on row numbers and their labels."""
    partitioner.dataset = _Columns(pa.table({"row": rows, "label": labels}))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [
            np.asarray(partitioner.load_partition(client).with_format("numpy")["row"][:], dtype=np.int64)
            for client in range(count)
        ]


def _dirichlet(config: RunConfig, count: int, labels: Rows, seed: int) -> list[Rows]:
    """Divide each label's rows by shares drawn from a Dirichlet distribution (Hsu et al., 1909.06335)."""
    alpha, fewest = config.partition.concentration, config.partition.min_examples
    for attempt in range(DIRICHLET_ATTEMPTS):
        partitioner = partitioners().DirichletPartitioner(
            num_partitions=count,
            partition_by="label",
            alpha=alpha,
            min_partition_size=fewest,
            self_balancing=False,
            seed=derive_seed(seed, "dirichlet", attempt),
        )
        try:
            return _deal(partitioner, np.arange(len(labels)), labels, count)
        except ValueError:
            continue
    raise PartitionError(
        f"partition.scheme = 'dirichlet' with partition.alpha = {alpha} never left every one of {count} clients "
        f"partition.min_examples = {fewest} of {len(labels)} rows. Raise alpha, or use fewer clients."
    )


def _pathological(config: RunConfig, count: int, labels: Rows, seed: int) -> list[Rows]:
    """Give each client rows of a few labels only: the first by turn, the others by chance (Li et al., 2102.02079)."""
    each, present = config.partition.classes_per_client, np.unique(labels)
    if each > len(present):
        raise PartitionError(
            f"partition.classes_per_client = {each}, but the training rows have {len(present)} labels. "
            f"Set it to {len(present)} or less."
        )
    if count * each < len(present):
        raise PartitionError(
            f"{count} clients with partition.classes_per_client = {each} cannot hold all {len(present)} labels. "
            f"Set it to {math.ceil(len(present) / count)} or more, or use more clients."
        )
    partitioner = partitioners().PathologicalPartitioner(
        num_partitions=count,
        partition_by="label",
        num_classes_per_partition=each,
        class_assignment_mode="first-deterministic",
        seed=derive_seed(seed, "pathological"),
    )
    try:
        parts = _deal(partitioner, np.arange(len(labels)), labels, count)
    except ValueError:
        raise PartitionError(
            f"partition.scheme = 'pathological' gives some label to more than its rows' number of {count} clients. "
            "Use fewer clients or more rows of the rarest label."
        ) from None
    seen = [set(np.unique(labels[part]).tolist()) for part in parts]
    for label in present.tolist():
        if any(label in labels_seen for labels_seen in seen):
            continue
        # some label has two holders or more, since there are at least as many places as labels: one of them swaps
        times = {other: [client for client in range(count) if other in seen[client]] for other in present.tolist()}
        other, holders = max(times.items(), key=lambda item: len(item[1]))
        giver, *receivers = holders
        given = parts[giver][labels[parts[giver]] == other]
        for receiver, share in zip(receivers, np.array_split(given, len(receivers)), strict=True):
            parts[receiver] = np.concatenate([parts[receiver], share])
        kept = parts[giver][labels[parts[giver]] != other]
        parts[giver] = np.concatenate([kept, np.flatnonzero(labels == label)])
        seen[giver] = (seen[giver] - {other}) | {label}
    return parts


def _shard(each: int, count: int, by_label: Rows, seed: int) -> list[Rows]:
    """Cut rows in the order of their labels into shards of equal size, give or take a row, and deal these.

    Flower deals the shards, of which it sees the numbers only; of rows, it would leave out those after the last shard.
    """
    number = count * each
    if number > len(by_label):
        raise PartitionError(
            f"{count} clients with partition.shards_per_client = {each} need {number} shards, but there are "
            f"{len(by_label)} rows. Use fewer clients or shards."
        )
    partitioner = partitioners().ShardPartitioner(
        num_partitions=count,
        partition_by="label",
        num_shards_per_partition=each,
        shard_size=1,
        seed=derive_seed(seed, "shard"),
    )
    shards = np.array_split(by_label, number)
    return [
        np.concatenate([shards[shard] for shard in dealt])
        for dealt in _deal(partitioner, np.arange(number), np.arange(number), count)
    ]
