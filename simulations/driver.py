"""A simulated run: its clients, its run directory, and the federation on a grid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from fedpeft.clients.app import OWN_PERSONAL, TRUST_REMOTE_CODE
from fedpeft.clients.rows import client_rows
from fedpeft.config import RunConfig, cohort_size
from fedpeft.mapped import verify
from fedpeft.presets import provenance
from fedpeft.privacy.books import Books
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.rows import check_rows
from fedpeft.resident import Resident, resident
from fedpeft.runs import CLIENTS, SIMULATED, Listener, RunDirectory
from fedpeft.runs.machine import footprint
from fedpeft.simulations.batching import batched, bundling_of
from fedpeft.simulations.charging import Charging
from fedpeft.simulations.contexts import Contexts
from fedpeft.simulations.failures import Failures
from fedpeft.simulations.grids.cluster import Sizing
from fedpeft.simulations.grids.freight import Freight
from fedpeft.simulations.grids.inline import InlineGrid
from fedpeft.simulations.grids.pace import Pace
from fedpeft.simulations.grids.ray import RayGrid
from fedpeft.simulations.prefixing import with_prefix_cache
from fedpeft.simulations.resuming import Resumption
from fedpeft.simulations.sizing import at_work, in_this_process
from fedpeft.simulations.work import Work
from fedpeft.strategies import find
from fedpeft.strategies.ending import check_ending
from fedpeft.strategies.federation import Insight, build_strategy, exported_bytes, federate
from fedpeft.strategies.rounds.records import Outcome
from fedpeft.strategies.rounds.report import require_enough
from fedpeft.training.prefix import feeding


def drive(
    config: RunConfig,
    out: Path,
    listener: Listener,
    grid: InlineGrid | RayGrid,
    resumption: Resumption | None = None,
) -> Outcome:
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
    resumption : Resumption, optional
        Of a run that goes on.
    """
    home = resident(config)
    verify(home.folder)  # before anybody loads the base
    check_rows(home)

    def note(message: str) -> None:
        listener({"event": "note", "message": message})

    privacy, level = config.privacy, level_of(config.privacy)
    if not privacy.is_private:  # else what is told of rows would need noise
        for message in home.data.notes:
            note(message)
        for problem in home.data.cautions:
            listener({"event": "warning", "round": 0, "message": problem})
    config, said = batched(with_prefix_cache(config, home, note), home)  # what is chosen here is fixed in config.toml
    clients = home.partition.client_ids
    node_config = {TRUST_REMOTE_CODE: config.model.trust_remote_code}
    contexts = Contexts(clients, config.to_flat(), node_config, out / CLIENTS)
    client_ids = dict(enumerate(clients, 1))
    rows = {client: client_rows(home, contexts.node_config(node)).num_examples for node, client in client_ids.items()}
    _check(config, home, client_ids, rows.values())
    sizing = _sized(config, grid, len(contexts))
    with _directory(config, out, home, sizing, resumption) as directory, _peak_on_record(config, grid, directory):
        for message in (f"workers: {sizing}" if sizing.workers else "", *home.adapted.notes, said):
            if message:
                note(message)
        charged = resumption is not None and resumption.ledger_is_begun
        resumed = None if resumption is None else resumption.begin(directory, contexts, listener)
        failures = Failures(config, directory, grid, client_ids)
        failures.watch(listener)
        _prepare(grid, config, home, contexts)
        books = None
        if privacy.is_private:
            counts = rows if level.weighs_rows(privacy) else {}
            books = Books(config, directory, counts, largest=max(rows.values(), default=None), resumes=charged)
            if level.clients_add_noise:
                grid.on_dispatch = Charging(config, home, grid, client_ids, books.ledger, books.run)
        insight = Insight(client_ids, lambda: contexts.records(OWN_PERSONAL), failures.explain, contexts, grid.map)
        return federate(config, grid, directory, listener=listener, insight=insight, books=books, resumed=resumed)


@contextlib.contextmanager
def _peak_on_record(config: RunConfig, grid: InlineGrid | RayGrid, directory: RunDirectory) -> Iterator[None]:
    """Put on record the most memory that a worker has taken, or this process where there is none.

    Not of a private run: how much a client needs follows from its rows.
    """
    yield
    if not config.privacy.is_private:
        need = None if isinstance(grid, InlineGrid) else grid.sizing.footprint
        peak = need if need is not None and need.measured else footprint()
        directory.add_facts({"peak_memory": peak.to_dict()})


def _prepare(grid: InlineGrid | RayGrid, config: RunConfig, home: Resident, contexts: Contexts) -> None:
    """Let a grid, which may have served another run, serve this one."""
    grid.contexts, grid.bundling, grid.on_dispatch = contexts, bundling_of(config), None
    if isinstance(grid, RayGrid):
        grid.pace = Pace(Work(config, home, contexts))
        grid.freight = partial(Freight.of, config.to_flat(), home)


def _directory(
    config: RunConfig, out: Path, home: Resident, sizing: Sizing, resumption: Resumption | None
) -> RunDirectory:
    adapter_bytes = exported_bytes(find(config.strategy.name), home.adapted)
    details = {SIMULATED: True, "presets": provenance(config.presets), "simulation": sizing.to_dict()}
    return RunDirectory(out, config, adapter_bytes, details, lock=None if resumption is None else resumption.lock)


def _sized(config: RunConfig, grid: InlineGrid | RayGrid, clients: int) -> Sizing:
    """Tell the grid how many clients are at work at a time, and return how many workers it has."""
    if isinstance(grid, InlineGrid):
        return in_this_process()
    grid.most = at_work(config, clients)
    return grid.sizing


def _check(config: RunConfig, home: Resident, client_ids: Mapping[int, str], rows: Iterable[int]) -> None:
    """Refuse what cannot come to its end, before the run directory is made."""
    federation = config.federation
    require_enough(len(client_ids), federation.min_clients)
    cohort = cohort_size(len(client_ids), federation.fraction, federation.min_clients)
    method = build_strategy(config, home)
    method.check_cohort(method.options, cohort)
    check_ending(config, home)
    level = level_of(config.privacy)
    level.check_counts(config, rows)
    with feeding(home.adapted.model, config):
        level.check_model(home)  # which every worker does for itself as well
