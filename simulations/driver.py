"""A simulated run: its clients, its run directory, and the federation on a grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from flwr.app import Context, RecordDict
from torch import Tensor

from fedpeft.clients.app import OWN_PERSONAL, TRUST_REMOTE_CODE
from fedpeft.clients.rows import client_rows
from fedpeft.config import RunConfig, cohort_size
from fedpeft.presets import provenance
from fedpeft.privacy.books import Books
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.rows import check_rows
from fedpeft.resident import Resident, resident
from fedpeft.runs import Listener, RunDirectory
from fedpeft.simulations.charging import Charging
from fedpeft.simulations.failures import Failures
from fedpeft.simulations.grids.inline import InlineGrid
from fedpeft.simulations.grids.ray import RayGrid
from fedpeft.simulations.prefixing import with_prefix_cache
from fedpeft.strategies import find
from fedpeft.strategies.federation import Insight, build_strategy, exported_bytes, federate
from fedpeft.strategies.rounds.records import Outcome
from fedpeft.strategies.rounds.report import require_enough
from fedpeft.training.prefix import feeding
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
    check_rows(home)
    config = with_prefix_cache(config, home, lambda note: listener({"event": "note", "message": note}))
    privacy, level = config.privacy, level_of(config.privacy)
    if not privacy.is_private:  # else what is told of rows would need noise
        for note in home.data.notes:
            listener({"event": "warning", "round": 0, "message": note})
    contexts, client_ids = client_contexts(config, home)
    rows = {client_ids[node]: client_rows(home, each.node_config).num_examples for node, each in contexts.items()}
    _check(config, home, client_ids, rows.values())
    adapter_bytes = exported_bytes(find(config.strategy.name), home.adapted)
    directory = RunDirectory(out, config, adapter_bytes, {"presets": provenance(config.presets)})
    for note in home.adapted.notes:
        listener({"event": "note", "message": note})
    grid.contexts = contexts
    failures = Failures(config, directory, grid, client_ids)
    failures.watch(listener)
    books, grid.on_dispatch = None, None
    if privacy.is_private:
        counts = rows if level.weighs_rows(privacy) else {}
        books = Books(config, directory, counts, largest=max(rows.values(), default=None))
    if books is not None and level.clients_add_noise:
        grid.on_dispatch = Charging(config, home, grid, client_ids, books.ledger, books.run)
    return federate(
        config,
        grid,
        directory,
        listener=listener,
        insight=Insight(client_ids, lambda: personal_tensors(contexts, client_ids), failures.explain),
        books=books,
    )


def _check(config: RunConfig, home: Resident, client_ids: Mapping[int, str], rows: Iterable[int]) -> None:
    """Refuse what cannot come to its end, before the run directory is made."""
    federation = config.federation
    require_enough(len(client_ids), federation.min_clients)
    cohort = cohort_size(len(client_ids), federation.fraction, federation.min_clients)
    method = build_strategy(config, home)
    method.check_cohort(method.options, cohort)
    level = level_of(config.privacy)
    level.check_counts(config, rows)
    with feeding(home.adapted.model, config):
        level.check_model(home)  # which every worker does for itself as well


def personal_tensors(
    contexts: Mapping[int, Context], client_ids: Mapping[int, str]
) -> Mapping[str, Mapping[str, Tensor]]:
    """Return what each client keeps to itself, by client id; nothing of one that has not trained."""
    return {
        client_ids[node]: to_tensors(context.state.array_records[OWN_PERSONAL])
        for node, context in contexts.items()
        if OWN_PERSONAL in context.state
    }


def client_contexts(config: RunConfig, home: Resident) -> tuple[dict[int, Context], dict[int, str]]:
    """Make one Flower context a client, and name the client of each node; node ids are partition ids plus one."""
    clients = home.partition.client_ids
    flat = config.to_flat()
    contexts = {
        index + 1: Context(
            run_id=1,
            node_id=index + 1,
            node_config={
                "partition-id": index,
                "num-partitions": len(clients),
                TRUST_REMOTE_CODE: config.model.trust_remote_code,
            },
            state=RecordDict(),
            run_config=dict(flat),
        )
        for index in range(len(clients))
    }
    return contexts, {index + 1: client for index, client in enumerate(clients)}
