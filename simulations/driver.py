"""A simulated run: its clients, its run directory, and the federation on a grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from torch import Tensor

from fedpeft.clients.app import OWN_PERSONAL, TRUST_REMOTE_CODE
from fedpeft.clients.rows import client_rows
from fedpeft.config import RunConfig, cohort_size
from fedpeft.formats import one_line
from fedpeft.presets import provenance
from fedpeft.privacy.books import Books
from fedpeft.privacy.mechanism import require_a_round
from fedpeft.resident import Resident, resident
from fedpeft.runs import Listener, RunDirectory, folder_name
from fedpeft.simulations.charging import Charging
from fedpeft.simulations.grids.inline import InlineGrid
from fedpeft.simulations.grids.ray import RayGrid
from fedpeft.strategies import find
from fedpeft.strategies.rounds.federation import Outcome, build_strategy, exported_bytes, federate
from fedpeft.strategies.rounds.report import require_enough
from fedpeft.wire import to_tensors

WITHHELD = (
    "The text of the error is withheld, since it may quote rows; privacy.release_metrics=true keeps it, and voids the "
    "guarantee."
)


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
        _ = home.row_engine  # shows that rows are independent, which every worker does for itself as well
    adapter_bytes = exported_bytes(find(config.strategy.name), home.adapted)
    directory = RunDirectory(out, config, adapter_bytes, {"presets": provenance(config)})
    for note in home.adapted.notes:
        listener({"event": "note", "message": note})
    grid.contexts = contexts
    tells = config.privacy.level == "none" or config.privacy.release_metrics
    of_clients = config.privacy.level == "client" and not tells  # then who took part is on no record
    if isinstance(grid, RayGrid):
        grid.on_worker_death = lambda node, deaths: listener(
            {
                "event": "warning",
                "message": f"a worker died over {'a client' if of_clients else f'client {client_ids[node]}'} and is "
                f"replaced ({deaths})",
            }
        )

    kept: dict[str, Path] = {}
    grid.causes.clear()  # of a run before this one

    def keep_traceback(node: int, message: Message, text: str) -> None:
        name = f"round-{int(message.metadata.group_id or 0):04d}-client-{folder_name(client_ids[node])}"
        path = directory.write_traceback(name, text if tells else f"{text}{WITHHELD}\n")
        if path is not None:
            kept[client_ids[node]] = path

    grid.on_failure, grid.withholds = None if of_clients else keep_traceback, not tells
    nodes = {client: node for node, client in client_ids.items()}

    def explain(client: str) -> str:
        """Say why a client raised, to who watches: of private rows, only what cannot quote or count them."""
        cause = grid.causes.get(nodes[client])
        told = tells or (cause is not None and cause.quotes_no_row and config.privacy.public_counts)
        if cause is None or not told:
            return ""
        return one_line(cause.text) + (f" (traceback: {kept[client]})" if client in kept else "")

    books, grid.on_dispatch = None, None
    if config.privacy.level == "client":  # of whole clients, their rows are of no interest
        books = Books(config, directory, {})
    elif config.privacy.level == "record":
        books = Books(
            config, directory, rows if config.privacy.public_counts else {}, largest=max(rows.values(), default=None)
        )
        grid.on_dispatch = Charging(config, home, grid, client_ids, books.ledger, books.run)

    def personal() -> Mapping[str, Mapping[str, Tensor]]:
        return {
            client_ids[node]: to_tensors(context.state.array_records[OWN_PERSONAL])
            for node, context in contexts.items()
            if OWN_PERSONAL in context.state
        }

    return federate(
        config,
        grid,
        directory,
        listener=listener,
        client_ids=client_ids,
        personal=personal,
        books=books,
        explain=explain,
    )


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
