"""Dividing training rows among clients."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import RunConfig, nest, resolve
from fedpeft.data.partition import Partition, partition, partition_table
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import PartitionError
from fedpeft.tasks.encoding import encode


def rows_of(
    labels: list[int] | None, domains: list[str] | None = None, clients: list[str] | None = None, count: int = 0
) -> EncodedSplit:
    """Make a split that holds nothing but what a partition looks at."""
    number = count or len(labels or domains or clients or ())
    tensors = {"offsets": torch.arange(number + 1)}
    names: dict[str, tuple[str, ...]] = {}
    if labels is not None:
        tensors["labels"] = torch.tensor(labels)
    for column, values in (("domains", domains), ("clients", clients)):
        if values is not None:
            names[column] = tuple(dict.fromkeys(values))
            tensors[column] = torch.tensor([names[column].index(value) for value in values])
    return EncodedSplit("causal-lm" if labels is None else "sequence-classification", tensors, names)


def configure(scheme: str, clients: int | None, seed: int = 0, **settings: Any) -> RunConfig:
    keys = {"partition.scheme": scheme, "run.seed": seed, **{f"partition.{key}": v for key, v in settings.items()}}
    return resolve([nest(keys | ({} if clients is None else {"federation.clients": clients}))])


def assert_each_row_once(held: Partition, count: int) -> None:
    assert sorted(np.concatenate(held.indices).tolist()) == list(range(count))
    for rows in held.indices:
        assert rows.dtype == np.int64
        assert np.all(np.diff(rows) > 0)


SCHEMES = ["iid", "dirichlet", "pathological", "shard", "linear", "square", "exponential", "domain"]


def divided(config: RunConfig, train: EncodedSplit) -> Partition | None:
    try:
        return partition(config, train)
    except PartitionError:
        return None


@given(
    scheme=st.sampled_from(SCHEMES),
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    clients=st.integers(1, 12),
    each=st.integers(1, 4),
    seed=st.integers(0, 3),
    given_alpha=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_each_row_goes_to_one_client_and_again_to_the_same(
    scheme: str, labels: list[int], clients: int, each: int, seed: int, given_alpha: bool
) -> None:
    own: dict[str, Any] = {"classes_per_client": each, "shards_per_client": each}
    config = configure(scheme, clients, seed, **own, **({"alpha": 0.7} if given_alpha else {}))
    train = rows_of(labels, [f"d{label % 3}" for label in labels])
    held = divided(config, train)
    if held is None:
        assert scheme != "iid" or clients > len(labels)
        return
    assert held.client_ids == tuple(str(client) for client in range(clients))
    assert_each_row_once(held, len(labels))
    assert min(map(len, held.indices)) >= 1
    again = partition(config, train)
    assert all(np.array_equal(a, b) for a, b in zip(held.indices, again.indices, strict=True))


LABELS = (np.arange(400) * 7 % 10).tolist()
DOMAINS = [f"d{row % 4}" for row in range(400)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_divides_otherwise(scheme: str) -> None:
    train = rows_of(LABELS, DOMAINS)
    first, second = (partition(configure(scheme, 6, seed), train) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(first.indices, second.indices, strict=True))


@pytest.mark.parametrize(
    ("scheme", "sizes"),
    [
        ("iid", [80, 80, 80, 80, 80]),
        ("linear", [26, 53, 80, 106, 135]),  # i / 15 of 400, the remainder to the last
        ("square", [7, 29, 65, 116, 183]),  # i^2 / 55
        ("exponential", [4, 12, 34, 93, 257]),  # e^i / sum
    ],
)
def test_sizes_follow_the_scheme_and_rows_are_mixed(scheme: str, sizes: list[int]) -> None:
    held = partition(configure(scheme, 5), rows_of(LABELS))
    assert [len(rows) for rows in held.indices] == sizes
    assert not np.array_equal(np.concatenate(held.indices), np.arange(400))


def skew(config: RunConfig) -> float:
    counts = partition(config, rows_of(LABELS)).label_counts(LABELS, 10)
    shares = counts / counts.sum(1, keepdims=True)
    return float(np.abs(shares - 0.1).sum(1).mean())


def test_a_smaller_alpha_makes_labels_more_skewed() -> None:
    skews = [skew(configure("dirichlet", 5, alpha=alpha)) for alpha in (0.1, 1.0, 1000.0)]
    assert skews[0] > skews[1] > skews[2]
    assert skews[2] < 0.2


@pytest.mark.parametrize(("clients", "each"), [(10, 2), (5, 2), (4, 3), (25, 1), (3, 10)])
def test_pathological_clients_hold_that_many_labels_and_all_labels_are_held(clients: int, each: int) -> None:
    held = partition(configure("pathological", clients, classes_per_client=each), rows_of(LABELS))
    counts = held.label_counts(LABELS, 10)
    assert ((counts > 0).sum(1) == each).all()
    assert_each_row_once(held, 400)


def test_shards_are_even_and_hold_neighbouring_labels() -> None:
    labels = sorted(LABELS)[:395]  # does not come out even
    held = partition(configure("shard", 10, shards_per_client=2), rows_of(labels))
    sizes = [len(rows) for rows in held.indices]
    assert max(sizes) - min(sizes) <= 2
    assert ((held.label_counts(labels, 10) > 0).sum(1) <= 4).all()
    assert_each_row_once(held, 395)


def test_a_natural_partition_has_one_client_per_value_in_the_order_of_numbers() -> None:
    config = resolve([nest({"partition.by": "who"})])
    clients = ["10", "9", "2", "10"]
    held = partition(config, rows_of(None, clients=clients))
    assert held.client_ids == ("2", "9", "10")
    assert [rows.tolist() for rows in held.indices] == [[2], [1], [0, 3]]
    named = partition(config, rows_of(None, clients=["b", "10", "9"]))
    assert named.client_ids == ("10", "9", "b")
    same = resolve([nest({"partition.by": "who", "federation.clients": 3})])
    assert partition(same, rows_of(None, clients=clients)).client_ids == held.client_ids


# domains


def domains_held(held: Partition, domains: list[str]) -> list[set[str]]:
    return [{domains[row] for row in rows} for rows in held.indices]


def test_client_i_holds_rows_of_domain_i_mod_d() -> None:
    held = partition(configure("domain", 6), rows_of(LABELS, DOMAINS))
    assert domains_held(held, DOMAINS) == [{"d0"}, {"d1"}, {"d2"}, {"d3"}, {"d0"}, {"d1"}]
    assert [len(rows) for rows in held.indices] == [50, 50, 100, 100, 50, 50]


def test_with_fewer_clients_than_domains_these_are_dealt_whole() -> None:
    held = partition(configure("domain", 3), rows_of(None, DOMAINS))
    assert domains_held(held, DOMAINS) == [{"d0", "d3"}, {"d1"}, {"d2"}]
    assert_each_row_once(held, 400)


def test_a_given_alpha_skews_labels_within_a_domain() -> None:
    def sizes(**settings: Any) -> NDArrays:
        held = partition(configure("domain", 8, **settings), rows_of(LABELS, DOMAINS))
        assert domains_held(held, DOMAINS) == [{f"d{client % 4}"} for client in range(8)]
        return held.label_counts(LABELS, 10)

    even, uneven = sizes(), sizes(alpha=0.1)
    assert even.sum(1).tolist() == [50] * 8
    assert (uneven == 0).sum() > (even == 0).sum()


NDArrays = np.ndarray[Any, np.dtype[np.int64]]


# errors


NO_LABELS = rows_of(None, DOMAINS)


@pytest.mark.parametrize(
    ("config", "train", "message"),
    [
        (configure("iid", None), rows_of(LABELS), r"scheme = 'iid' needs the number of clients.*federation\.clients"),
        (configure("iid", 401), rows_of(LABELS), r"federation\.clients = 401, but there are 400"),
        (configure("dirichlet", 4), NO_LABELS, r"'dirichlet' divides rows by their labels.*causal-lm.*iid"),
        (configure("shard", 4), NO_LABELS, r"'shard' divides rows by their labels"),
        (configure("pathological", 4), NO_LABELS, r"'pathological' divides rows by their labels"),
        (
            configure("dirichlet", 30, alpha=0.001),
            rows_of(LABELS),
            r"alpha = 0\.001 never left every one of 30 clients",
        ),
        (configure("pathological", 4, classes_per_client=11), rows_of(LABELS), r"= 11, but .* have 10 labels"),
        (configure("pathological", 4), rows_of(LABELS), r"4 clients .* = 2 cannot hold all 10 labels.*Set it to 3"),
        (configure("pathological", 30), rows_of([0] * 29 + [1] * 11), r"some label to more.* of 30 clients"),
        (configure("shard", 9), rows_of([0, 1] * 8), r"need 18 shards, but there are 16 rows"),
        (configure("exponential", 20), rows_of(LABELS), r"'exponential' leaves some of 20 clients without any"),
        (
            configure("iid", 5, min_examples=81),
            rows_of(LABELS),
            r"client '0' would hold 80 of 400 rows .*min_examples = 81",
        ),
        (configure("domain", 3), rows_of(LABELS), r"needs data\.domain"),
        (
            configure("domain", 8),
            rows_of(None, ["a", "b"] * 4 + ["c"]),
            r"domain 'c' has 1 training rows for 2 clients",
        ),
        (resolve([nest({"partition.by": "who"})]), rows_of(LABELS), r"do not have the column partition\.by = 'who'"),
        (
            resolve([nest({"partition.by": "who", "federation.clients": 5})]),
            rows_of(LABELS, clients=DOMAINS),
            r"federation\.clients = 5, but the column partition\.by = 'who' has 4 values",
        ),
    ],
)
def test_what_cannot_be_divided_is_said_in_one_line(config: RunConfig, train: EncodedSplit, message: str) -> None:
    with pytest.raises(PartitionError, match=message) as caught:
        partition(config, train)
    assert "\n" not in str(caught.value)


# what is shown


def test_label_counts_are_those_of_each_clients_rows() -> None:
    held = Partition(("a", "b"), (np.array([0, 3]), np.array([1, 2, 4])))
    assert held.label_counts([2, 0, 2, 2, 0], 4).tolist() == [[0, 0, 2, 0], [2, 0, 1, 0]]
    assert held.label_counts(torch.tensor([2, 0, 2, 2, 0]), 3).tolist() == [[0, 0, 2], [2, 0, 1]]


def test_a_table_counts_rows_by_label_and_domain() -> None:
    held = Partition(("a", "b"), (np.array([0, 3]), np.array([1, 2])))
    train = rows_of([1, 0, 1, 1], ["n", "n", "s", "s"])
    assert partition_table(held, train, ("no", "yes")) == [
        {"client": "a", "rows": 2, "labels": {"no": 0, "yes": 2}, "domains": {"n": 1, "s": 1}},
        {"client": "b", "rows": 2, "labels": {"no": 1, "yes": 1}, "domains": {"n": 1, "s": 1}},
    ]
    assert partition_table(held, rows_of(None, count=4)) == [{"client": "a", "rows": 2}, {"client": "b", "rows": 2}]


ELSEWHERE = """
import hashlib, sys
from pathlib import Path
from fedpeft.config import nest, resolve
from fedpeft.data import tokens
from fedpeft.tasks.encoding import encode
from fedpeft.data.partition import partition
tokens.tokenise = None  # what is cached is not tokenised again
config = resolve([nest(eval(sys.argv[1]))])
data = encode(config, Path(sys.argv[2]))
held = partition(config, data.train)
print(data.fingerprint, hashlib.sha256(b"".join(rows.tobytes() for rows in held.indices)).hexdigest())
"""


def test_another_process_opens_the_same_rows_and_divides_them_alike(text_csv: Path, tiny_bert: Path) -> None:
    keys = {"data.source": str(text_csv), "partition.scheme": "dirichlet", "federation.clients": 5}
    config = resolve([nest(keys)])
    data = encode(config, tiny_bert)
    held = partition(config, data.train)
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, repr(keys), str(tiny_bert)],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    digest = hashlib.sha256(b"".join(rows.tobytes() for rows in held.indices)).hexdigest()
    assert ran.stdout.split() == [data.fingerprint, digest]


def test_partitioners_come_without_the_plots_of_their_package_which_can_still_be_had() -> None:
    program = (
        "import sys; from fedpeft.data.schemes import partitioners; partitioners().IidPartitioner\n"
        "assert not {'seaborn', 'matplotlib', 'flwr_datasets.visualization'} & sys.modules.keys()\n"
        "from flwr_datasets.visualization import plot_label_distributions"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
