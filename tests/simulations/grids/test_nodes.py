"""Two raylets on this machine stand for two machines, with a home and a cache of their own for two disks."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from flwr.app import Context, Message
from ray.cluster_utils import Cluster

from fedpeft.config import RunConfig
from fedpeft.runs import read_events
from fedpeft.runs.machine import Footprint
from fedpeft.simulations.grids import ray as ray_grid
from fedpeft.simulations.grids.cluster import Node, Sizing
from fedpeft.simulations.grids.ray import RayGrid
from fedpeft.simulations.simulate import simulate

MakeContexts = Callable[[int], dict[int, Context]]
MakeMessage = Callable[..., Message]


class Machines(NamedTuple):
    """A cluster, and what stands for the disks of its two machines."""

    cluster: Cluster
    here: Path
    there: Path


def disk(folder: Path) -> dict[str, str]:
    """Return the variables that make a process take this folder for its disk."""
    return {"HOME": str(folder), "FEDPEFT_CACHE_DIR": str(folder / "cache")}


@pytest.fixture(scope="module")
def machines(importable_apps: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in disk(here).items():
            patch.setenv(name, value)
        for name, value in ray_grid_environment().items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 128 * 2**20})
        try:
            yield Machines(cluster, here, there)
        finally:
            cluster.shutdown()


def ray_grid_environment() -> dict[str, str]:
    from fedpeft.simulations.grids.cluster import RAY_ENVIRONMENT

    return RAY_ENVIRONMENT


def add_node(machines: Machines, **options: object) -> object:
    return machines.cluster.add_node(
        num_cpus=1, object_store_memory=128 * 2**20, env_vars=disk(machines.there), **options
    )


class OneACpu:
    """A `Sizer` that goes by CPUs, or by GPUs where there are any, of all nodes."""

    def __init__(self, share: float = 0.0) -> None:
        self.share = share

    def fit(self, nodes: Sequence[Node], most: int | None = None) -> Sizing:
        if self.share:
            return Sizing(int(sum(node.gpus for node in nodes) / self.share), self.share)
        return Sizing(sum(node.cpus for node in nodes))

    def learn(self, footprint: Footprint) -> None:
        pass


def await_all(grid: RayGrid) -> None:
    """Wait until all workers are up: else the first one might do all there is before the second is."""
    grid._ready()
    assert grid._pool is not None
    while grid._pool.free() < grid.sizing.workers:
        grid._pool.wait(1.0)


def seen(reply: Message) -> dict[str, object]:
    assert not reply.has_error(), reply.error
    return dict(reply.content.config_records["seen"])


WHILE = 300.0  # seconds; where time may be up, quick messages do not travel together


def adapter_hash(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_node_without_base_and_rows_is_sent_them_once_and_trains_to_the_same_bytes(
    machines: Machines, text_config: Callable[..., RunConfig], tiny_bert: Path, text_csv: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, machines.here / "model")
    shutil.copy(text_csv, machines.here / "rows.csv")
    common = {
        "model__name": "~/model", "data__source": "~/rows.csv", "federation__rounds": 1, "federation__fraction": 0.67,
        "strategy__name": "fedit",
    }  # fmt: skip
    alone = simulate(text_config(**common), tmp_path / "alone").path
    node = add_node(machines)
    try:
        with RayGrid(workers=2, address=machines.cluster.address) as grid:
            await_all(grid)
            run = simulate(text_config(**common, simulation__workers=2), tmp_path / "both", grid=grid).path
    finally:
        machines.cluster.remove_node(node)
    assert adapter_hash(run) == adapter_hash(alone)
    assert [event["failed"] for event in read_events(run) if event["event"] == "round"] == [0]
    weights = list((machines.there / "cache" / "received").glob("*/model.safetensors"))
    assert [path.read_bytes() for path in weights] == [(tiny_bert / "model.safetensors").read_bytes()]
    assert len(list((machines.there / "cache" / "encoded").glob("*/rows.safetensors"))) == 1
    assert not (machines.here / "cache" / "received").exists(), "the driver's own node was sent what it has"


def test_a_node_that_joins_is_used_and_one_that_leaves_costs_nothing_but_time(
    machines: Machines,
    make_contexts: MakeContexts,
    make_message: MakeMessage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_grid, "LOOK_SECONDS", 0.0)
    deaths: list[tuple[int, int]] = []
    with RayGrid("simulated_clients:app", make_contexts(20), OneACpu(), address=machines.cluster.address) as grid:
        grid.on_worker_death = lambda *death: deaths.append(death)
        (first,) = (seen(reply) for reply in grid.send_and_receive([make_message(1, "train.place")]))
        node = add_node(machines)
        # the joined node's worker frees the head's: each waits until the other has begun
        marks = [tmp_path / name for name in ("one", "other")]
        pair = [
            make_message(2, "train.place", started=str(marks[0]), awaited=str(marks[1])),
            make_message(3, "train.place", started=str(marks[1]), awaited=str(marks[0])),
        ]
        both = {seen(reply)["node"] for reply in grid.send_and_receive(pair, timeout=WHILE)}
        assert len(both) == 2
        assert first["node"] in both
        # one of these two is at work on the node that leaves
        begun = [tmp_path / name for name in ("begun-1", "begun-2")]
        gone, replies = tmp_path / "gone", []
        messages = [
            make_message(4 + at, "train.place", started=str(mark), awaited=str(gone)) for at, mark in enumerate(begun)
        ]
        stream = grid.send_and_receive(leaving(messages, machines, node, begun, gone), timeout=WHILE)
        replies = [seen(reply)["node"] for reply in stream]
        assert replies == [first["node"]] * 4
        assert [attempt for _, attempt in deaths] == [1]


def leaving(
    messages: list[Message], machines: Machines, node: object, begun: list[Path], gone: Path
) -> Iterator[Message]:
    """Yield two messages; once both are at work end a node, and yield two more."""
    yield from messages
    while not all(mark.exists() for mark in begun):
        time.sleep(0.01)
    machines.cluster.remove_node(node)
    gone.touch()
    for at in range(2):
        yield Message(messages[0].content, 10 + at, "train.place", group_id="1")


@pytest.mark.parametrize(("gpus", "share", "seen_by"), [(2, 1.0, ["0", "1"]), (1, 0.5, ["0", "0"])])
def test_workers_share_the_gpus_that_ray_gives_out(
    gpus: int,
    share: float,
    seen_by: list[str],
    machines: Machines,
    make_contexts: MakeContexts,
    make_message: MakeMessage,
    tmp_path: Path,
) -> None:
    node = add_node(machines, num_gpus=gpus)
    try:
        with RayGrid(
            "simulated_clients:app", make_contexts(2), OneACpu(share), address=machines.cluster.address
        ) as grid:
            assert grid.sizing.workers == 2
            both = str(tmp_path / "both")  # are at work at a time
            messages = [make_message(1, "train.place", awaited=both), make_message(2, "train.place", started=both)]
            replies = [seen(reply) for reply in grid.send_and_receive(messages)]
    finally:
        machines.cluster.remove_node(node)
    assert len({reply["pid"] for reply in replies}) == 2
    assert sorted(str(reply["gpu"]) for reply in replies) == seen_by
