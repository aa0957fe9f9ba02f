"""The engines that the echoing client runs on."""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from benchmarks.echo import app
from benchmarks.record import high_water, own_memory, reset_high_water

PATIENCE = 120.0  # seconds


def rounds(grid: Grid, nodes: Iterable[int], size: int, count: int) -> dict[str, Any]:
    """Hold rounds of FedAvg over one array, folding replies in as they are handed over.

    Returned are the seconds of each, and bytes of this process: before, at its peak, and by how many of its own it has
    grown at most, as seen whenever a reply was folded in.
    """
    nodes, sent = list(nodes), np.zeros(max(1, size // 4), np.float32)
    seconds = []
    before, own = high_water(os.getpid()), own_memory(os.getpid())
    most = own
    reset_high_water()
    for number in range(count):
        started = time.perf_counter()
        record = ArrayRecord({"x": Array(sent)})
        messages = [Message(RecordDict({"arrays": record}), node, "train", group_id=str(number)) for node in nodes]
        total = np.zeros_like(sent)
        replies = 0
        for reply in grid.send_and_receive(messages):
            total += reply.content.array_records["arrays"]["x"].numpy()
            replies += 1
            most = max(most, own_memory(os.getpid()))
        sent = total / replies
        seconds.append(time.perf_counter() - started)
    assert replies == len(nodes)
    assert sent[0] == count, "every client has added one in every round"
    return {"seconds": seconds, "before": before, "peak": high_water(os.getpid()), "own_grown": most - own}


def through_flower(size: int, clients: int, count: int, workers: int) -> dict[str, Any]:
    """Use Flower's simulation runtime, one CPU a client."""
    os.environ.update({"FLWR_TELEMETRY_ENABLED": "0", "RAY_worker_niceness": "0"})  # the latter as in `RayGrid`
    from flwr.simulation import run_simulation

    found: dict[str, Any] = {}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        deadline = time.monotonic() + PATIENCE
        while len(nodes := list(grid.get_node_ids())) < clients:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(nodes)} of {clients} clients are there after {PATIENCE:g} s")
            time.sleep(0.1)
        found.update(rounds(grid, nodes, size, count))

    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": workers},
        },
    )
    return found


def through_ours(size: int, clients: int, count: int, workers: int) -> dict[str, Any]:
    """Use fedpeft's grid, in this process where there are no workers."""
    from fedpeft.simulations.grids.inline import InlineGrid
    from fedpeft.simulations.grids.ray import RayGrid

    contexts: Mapping[int, Context] = {
        node: Context(1, node, {"partition-id": node - 1}, RecordDict(), {}) for node in range(1, clients + 1)
    }
    if not workers:
        return rounds(InlineGrid(app, contexts), contexts, size, count)
    with RayGrid("benchmarks.echo:app", contexts, workers) as grid:
        return rounds(grid, contexts, size, count)
