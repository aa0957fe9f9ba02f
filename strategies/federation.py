"""One federated run from the server's side: the loop of a method's rounds, with evaluation and records around it.

Simulation and deployment both come through `federate`; they differ in the grid alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import AdapterState, Role, num_bytes, role_of
from fedpeft.config import RunConfig
from fedpeft.errors import BudgetSpentError, ConfigError, TooFewClientsError
from fedpeft.privacy.books import Books
from fedpeft.privacy.levels import level_of
from fedpeft.resident import Resident, resident
from fedpeft.runs import ADAPTER_BEST, Listener, RunDirectory
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.ending import best_metric, check_ending, monitored
from fedpeft.strategies.registry import find
from fedpeft.strategies.rounds.checkpoints import CONFIG, Checkpoints, ClientStates, Resumed, lasting
from fedpeft.strategies.rounds.ending import Best, Budget, EarlyEndError, Patience
from fedpeft.strategies.rounds.loop import Loop
from fedpeft.strategies.rounds.records import (
    Adapters,
    Explain,
    Journal,
    Outcome,
    Personal,
    PlantedRows,
    Records,
    Spending,
)
from fedpeft.strategies.rounds.samples import samples
from fedpeft.strategies.rounds.scoring import Map, Scoring
from fedpeft.strategies.rounds.terms import RunTerms
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.strategies.volume import client_ranks, cohort_of, volume
from fedpeft.wire import to_record


@dataclass(frozen=True)
class Insight:
    """What a simulation knows of its clients, and a deployment does not.

    Parameters
    ----------
    client_ids : mapping of int to str
        Client id of each node.
    personal : callable, optional
        Gives the clients' personal tensors.
    explain : callable, optional
        Says more of why a client raised than goes on record.
    states : ClientStates, optional
        What the clients keep from round to round.
    map : callable, optional
        Calls a function of a module with each job at the workers, as `Scoring` needs it.
    """

    client_ids: Mapping[int, str] = field(default_factory=dict)
    personal: Personal | None = None
    explain: Explain | None = None
    states: ClientStates | None = None
    map: Map | None = None


def build_strategy(config: RunConfig, home: Resident, client_ids: Mapping[int, str] | None = None) -> AdapterStrategy:
    """Make the configured method for this adapter."""
    adapter, method = config.adapter, find(config.strategy.name)
    if method.capabilities.changes_base:
        home.adapted.check_movable(f"strategy.name = '{method.name}'")
    tokens = [name for name in home.adapted.beside if name not in home.adapted.stacks]
    if tokens and method.capabilities.trains == Role.B:
        raise ConfigError(
            f"strategy '{method.name}' trains B alone, and of an embedding, such as '{tokens[0]}', A begins at zero: "
            "it would learn nothing. Leave it out of adapter.targets, or take another strategy."
        )
    terms = RunTerms(
        fraction_train=config.federation.fraction,
        min_clients=config.federation.min_clients,
        seed=config.run.seed,
        scaling=adapter.scaling,
        frozen=home.adapted.frozen,
        client_ids=client_ids or {},
        measure_error=config.run.aggregation_error and adapter.facts.has_factors,
        ranks=client_ranks(config),
        scaling_of=adapter.scaling_of,
        offset=home.adapted.offset,
        client_privacy=level_of(config.privacy).server_mechanism(config),
        stop_when_spent=config.privacy.on_exhausted == "stop",
    )
    return method(terms=terms, **config.strategy.options)


def exported_bytes(method: type[AdapterStrategy], adapted: AdaptedModel) -> int:
    """Return the size of the largest adapter that a run may write, the changes of the base included."""
    size = num_bytes(adapted.initial.values())
    if method.capabilities.changes_base:
        factors = AdapterState.from_tensors(adapted.initial, adapted.scaling).factors
        shapes = [(f.A.shape[1], f.B.shape[0]) for f in factors.values()]
        size += sum(4 * min(d_in, d_out) * (d_in + d_out) for d_in, d_out in shapes)
    return size


def personal_names(method: AdapterStrategy | type[AdapterStrategy], adapted: AdaptedModel) -> list[str]:
    """Return the names of the tensors that stay with each client: the method's, and a local head."""
    roles = method.capabilities.personal
    return [name for name in adapted.trained if role_of(name) in roles or name in adapted.personal]


def federate(
    config: RunConfig,
    grid: Grid,
    directory: RunDirectory,
    *,
    listener: Listener,
    insight: Insight | None = None,
    timeout: float | None = None,
    books: Books | None = None,
    resumed: Resumed | None = None,
) -> Outcome:
    """Run all rounds on a grid, and leave a complete run directory whatever happens.

    Parameters
    ----------
    config : RunConfig
        Resolved, see `fedpeft.strategies.with_typed_options`.
    grid : flwr.serverapp.Grid
        Where the clients are.
    directory : RunDirectory
        Receives events, checkpoints and the adapter.
    listener : callable
        Called with each event after it is recorded.
    insight : Insight, optional
        What is known of the clients, in a simulation.
    timeout : float, optional
        Seconds to wait for a round's replies; None waits for all.
    books : Books, optional
        Of what is spent, where the run is private.
    resumed : Resumed, optional
        From where the run goes on, if it is one that was begun.
    """
    insight, home = insight or Insight(), resident(config)
    adapted, method = home.adapted, build_strategy(config, home, insight.client_ids)
    # a personal factor is part of the server's adapter too, as drawn, since there is no layer without it
    initial = {name: tensor for name, tensor in adapted.initial.items() if name not in adapted.personal}
    personal, privacy = personal_names(method, adapted), method.terms.client_privacy
    loop, journal = Loop(method, grid, to_record(initial), timeout), Journal(directory, listener)
    withholds = privacy is not None and not config.privacy.release_metrics
    records = Records(journal, method, books, insight.explain, withholds)
    state = AdapterState.from_tensors(initial, adapted.scaling)
    loop.watchers += _adapters(config, Adapters(directory, home, state, insight.personal), records)
    if books is not None:  # before the records, which say what is spent so far
        loop.watchers.append(_spending(config, journal, books, loop, {str(role_of(name)) for name in personal}))
    loop.watchers += [PlantedRows(journal, home, initial)] if config.privacy.canaries else []
    last, facts = config.federation.rounds, {"strategy": method.name, CONFIG: lasting(config)}
    scoring = Scoring(config, home, personal, insight.personal, insight.map)
    keeper = Checkpoints(directory, config.run.checkpoint_every, last, loop.memory, insight.states, facts)
    # at an end, what can be gone on from is saved first
    shown = samples(scoring, journal, initial)
    loop.watchers = [keeper, *_endings(config, home, scoring), *loop.watchers, *shown, records]
    method.summary()
    if resumed is not None:
        loop.recall(resumed.checkpoint.round, keeper.goes_on(resumed))
    try:
        loop.run(last, evaluate=scoring)
    except (KeyboardInterrupt, TooFewClientsError, BudgetSpentError, EarlyEndError):
        if not records.is_closed:  # what came while the end was written is in no outcome
            raise
    return records.outcome


def _endings(config: RunConfig, home: Resident, scoring: Scoring) -> list[Watcher]:
    """Return what may end the run before its last round; they come first, as a round that is not held costs nothing."""
    check_ending(config, home)
    run, endings = config.run, list[Watcher]()
    if run.patience is not None:
        patience = Patience(monitored(config), run.patience)
        scoring.is_over_with = patience.is_over_with
        endings.append(patience)
    if run.max_megabytes is not None:
        cohort = cohort_of(config, home)
        budget = Budget(run.max_megabytes, lambda number: cohort * sum(volume(config, home, number)))
        scoring.is_over_after = budget.is_over_after
        endings.append(budget)
    return endings


def _adapters(config: RunConfig, adapters: Adapters, records: Records) -> list[Watcher]:
    """Return what writes the run's adapters: the last one, and the best if asked."""
    if (metric := best_metric(config)) is None:
        return [adapters]
    records.best = Best(metric, adapters.state, lambda best: adapters.write(best, ADAPTER_BEST))
    return [adapters, records.best]


def _spending(config: RunConfig, journal: Journal, books: Books, loop: Loop, kept: set[str]) -> Spending:
    """Return what keeps a private run's books."""
    privacy = loop.terms.client_privacy
    charge = None if privacy is None else privacy.charge(config.federation.fraction)
    return Spending(journal, books, resident(config), charge, lambda: (list(loop.client_ids.values()), sorted(kept)))
