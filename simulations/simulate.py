"""One call from a configuration to a run directory: many clients on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from torch import Tensor

from fedpeft.chatter import silence
from fedpeft.clients.app import PERSONAL, TRUST_REMOTE_CODE
from fedpeft.clients.app import app as client_app
from fedpeft.config import RunConfig
from fedpeft.resident import Resident, preset_provenance, presets_of, resident
from fedpeft.runs import Event, Listener, RunDirectory, check_vacant, default_directory
from fedpeft.simulations.inline_grid import InlineGrid
from fedpeft.simulations.ray_grid import RayGrid
from fedpeft.state import num_bytes
from fedpeft.strategies.federation import Outcome, federate, with_typed_options
from fedpeft.strategies.rounds import require_enough
from fedpeft.wire import to_tensors

CLIENT_APP = "fedpeft.clients.app:app"


def _ignore(event: Event) -> None:
    """Listen to nothing: the run directory holds all events."""


def simulate(
    config: RunConfig, out: Path | None = None, *, listener: Listener = _ignore, verbose: bool = False
) -> Outcome:
    """Simulate a federation.

    Parameters
    ----------
    config : RunConfig
        What to do; see `fedpeft.config`.
    out : Path, optional
        The run directory; ``runs/<name>`` if not given. It must hold nothing.
    listener : callable, optional
        Called with each event.
    verbose : bool
        Let the libraries below speak.

    Returns
    -------
    Outcome
        Where the run directory is, how many rounds were done and the last scores.

    Raises
    ------
    FedpeftError
        Input that cannot work; nothing has been overwritten.
    """
    if not verbose:
        silence()
    config = with_typed_options(config)
    out = out or default_directory(config)
    check_vacant(out)
    workers = config.simulation.workers
    if workers == 0:
        return _run(config, out, listener, InlineGrid(client_app, threads=config.simulation.threads_per_worker))
    grid = RayGrid(
        CLIENT_APP,
        workers=workers or _default_workers(config),
        threads_per_worker=config.simulation.threads_per_worker,
        gpus_per_worker=config.simulation.gpus_per_worker,
        verbose=verbose,
    )
    with grid:
        if not presets_of(config):  # mistakes are in models and rows of one's own: let them come out before Ray starts
            resident(config).check()
        grid.start()  # its processes start while this one loads model and rows
        return _run(config, out, listener, grid)


def _default_workers(config: RunConfig) -> int:
    """One worker a core, and no more than there are clients."""
    cores = os.cpu_count() or 1
    return max(1, min(cores, config.federation.clients or cores))


def _run(config: RunConfig, out: Path, listener: Listener, grid: InlineGrid | RayGrid) -> Outcome:
    home = resident(config)
    contexts, client_ids = client_contexts(config, home)
    require_enough(len(contexts), config.federation.min_clients)
    adapter_bytes = num_bytes(home.adapted.initial.values())
    directory = RunDirectory(out, config, adapter_bytes, {"presets": preset_provenance(config)})
    grid.contexts = contexts
    if isinstance(grid, RayGrid):
        grid.on_worker_death = lambda node, deaths: listener(
            {"event": "warning", "message": f"a worker died over client {client_ids[node]} and is replaced ({deaths})"}
        )

    def keep_traceback(node: int, message: Message, text: str) -> None:
        directory.write_traceback(f"round-{int(message.metadata.group_id or 0):04d}-client-{client_ids[node]}", text)

    grid.on_failure = keep_traceback

    def personal() -> Mapping[str, Mapping[str, Tensor]]:
        return {
            client_ids[node]: to_tensors(context.state.array_records[PERSONAL])
            for node, context in contexts.items()
            if PERSONAL in context.state
        }

    return federate(config, grid, directory, listener=listener, client_ids=client_ids, personal=personal)


def client_contexts(config: RunConfig, home: Resident) -> tuple[dict[int, Context], dict[int, str]]:
    """Make one Flower context a client, and name the client of each node; node ids are partition ids plus one."""
    held = home.partition
    flat = config.to_flat()
    contexts = {
        index + 1: Context(
            run_id=1,
            node_id=index + 1,
            node_config={
                "partition-id": index,
                "num-partitions": len(held.client_ids),
                TRUST_REMOTE_CODE: config.model.trust_remote_code,
            },
            state=RecordDict(),
            run_config=dict(flat),
        )
        for index in range(len(held.client_ids))
    }
    return contexts, {index + 1: client for index, client in enumerate(held.client_ids)}
