"""A simulated run: its clients, its run directory, and the federation on a grid."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from torch import Tensor

from fedpeft.clients.app import OWN_PERSONAL, TRUST_REMOTE_CODE
from fedpeft.clients.rows import client_rows
from fedpeft.config import RunConfig, cohort_size
from fedpeft.presets import provenance
from fedpeft.privacy.books import Books
from fedpeft.privacy.mechanism import require_a_round
from fedpeft.resident import Resident, resident
from fedpeft.runs import Listener, RunDirectory, folder_name
from fedpeft.simulations.charging import Charging
from fedpeft.simulations.inline_grid import InlineGrid
from fedpeft.simulations.ray_grid import RayGrid
from fedpeft.strategies import find
from fedpeft.strategies.federation import Outcome, build_strategy, exported_bytes, federate
from fedpeft.strategies.rounds import require_enough
from fedpeft.wire import to_tensors


def drive(config: RunConfig, out: Path, listener: Listener, grid: InlineGrid | RayGrid) -> Outcome:
    """Give the grid its clients, and run the federation on it.

    Parameters
    ----------
    config : RunConfig
        Resolved, see `fedpeft.strategies.with_typed_options`.
    out : Path
        The run directory.
    listener : callable
        Called with each event.
    grid : InlineGrid or RayGrid
        Where the clients are to train.
    """
    home = resident(config)
    home.check()
    if config.privacy.level == "none":  # else what is told of rows would need noise
        for note in home.data.notes:
            listener({"event": "warning", "round": 0, "message": note})
    contexts, client_ids = client_contexts(config, home)
    federation = config.federation
    require_enough(len(contexts), federation.min_clients)
    cohort = cohort_size(len(contexts), federation.fraction, federation.min_clients)
    build_strategy(config, home, client_ids).check_cohort(cohort)
    rows = {client_ids[node]: client_rows(home, held.node_config).num_examples for node, held in contexts.items()}
    if config.privacy.level == "record":
        require_a_round(config, rows.values())
    adapter_bytes = exported_bytes(find(config.strategy.name), home.adapted)
    directory = RunDirectory(out, config, adapter_bytes, {"presets": provenance(config)})
    grid.contexts = contexts
    if isinstance(grid, RayGrid):
        grid.on_worker_death = lambda node, deaths: listener(
            {"event": "warning", "message": f"a worker died over client {client_ids[node]} and is replaced ({deaths})"}
        )

    numbers = itertools.count(1)

    def keep_traceback(node: int, message: Message, text: str) -> None:
        # who took part in a round of clients' privacy is on no record
        hidden = config.privacy.level == "client"
        client = f"withheld-{next(numbers)}" if hidden else folder_name(client_ids[node])
        directory.write_traceback(f"round-{int(message.metadata.group_id or 0):04d}-client-{client}", text)

    grid.on_failure = keep_traceback
    books, grid.on_dispatch = None, None
    if config.privacy.level == "client":  # of whole clients, their rows are of no interest
        books = Books(config, directory, {})
    elif config.privacy.level == "record":
        books = Books(config, directory, rows if config.privacy.public_counts else {})
        grid.on_dispatch = Charging(config, home, grid, client_ids, books.ledger, books.run)

    def personal() -> Mapping[str, Mapping[str, Tensor]]:
        return {
            client_ids[node]: to_tensors(context.state.array_records[OWN_PERSONAL])
            for node, context in contexts.items()
            if OWN_PERSONAL in context.state
        }

    return federate(config, grid, directory, listener=listener, client_ids=client_ids, personal=personal, books=books)


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
