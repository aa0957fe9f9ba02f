"""One federated run from the server's side: a strategy, with evaluation, records and checkpoints around it.

Simulation and deployment both come through `federate`; they differ in the grid alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.kinds import ADDITIVE_KINDS, R_KINDS
from fedpeft.adapters.state import AdapterState, ClientUpdate, num_bytes, role_of
from fedpeft.config import RunConfig
from fedpeft.errors import BudgetSpentError, FedpeftError, TooFewClientsError
from fedpeft.jsons import to_json
from fedpeft.privacy.books import Books
from fedpeft.privacy.canaries import write_scores
from fedpeft.privacy.levels import level_of
from fedpeft.privacy.overlap import in_the_clear
from fedpeft.privacy.statement import PRIVACY
from fedpeft.resident import Resident, resident
from fedpeft.runs import ADAPTER, Event, Listener, RunDirectory, folder_name
from fedpeft.strategies import find
from fedpeft.strategies.algebra.base_changes import exact_sum
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.rounds.report import Fault, RoundReport
from fedpeft.training.evaluation import Scores, client_metrics, mean_metrics, score, spread
from fedpeft.wire import SECONDS, TRAIN_LOSS, to_record, to_tensors

# the clients' personal tensors by client id; empty before a client has trained
Personal = Callable[[], Mapping[str, Mapping[str, Tensor]]]
Explain = Callable[[str], str]  # of a client id, why it raised; empty where nothing may be said


@dataclass
class Outcome:
    """How a run ended.

    Parameters
    ----------
    path : Path
        The run directory.
    rounds : int
        Rounds done.
    scores : dict
        The last evaluation's event.
    reason : str
        ``completed``, ``interrupted``, or what stopped it.
    error : FedpeftError or None
        What stopped it, where that was an error.
    """

    path: Path
    rounds: int = 0
    scores: Event = field(default_factory=dict)
    reason: str = "completed"
    error: FedpeftError | None = None


def build_strategy(config: RunConfig, home: Resident, client_ids: Mapping[int, str] | None) -> AdapterStrategy:
    """Make the configured method for this adapter."""
    adapter, method = config.adapter, find(config.strategy.name)
    if method.capabilities.changes_base:
        home.adapted.check_movable(f"strategy.name = '{method.name}'")
    return method(
        fraction_train=config.federation.fraction,
        min_clients=config.federation.min_clients,
        seed=config.run.seed,
        scaling=config.adapter.scaling,
        frozen=home.adapted.frozen,
        client_ids=client_ids,
        measure_error=config.run.aggregation_error and adapter.kind in ADDITIVE_KINDS | R_KINDS,
        ranks=client_ranks(config),
        scaling_of=adapter.scaling_of,
        offset=home.adapted.offset,
        client_privacy=level_of(config.privacy).server_mechanism(config),
        stop_when_spent=config.privacy.on_exhausted == "stop",
        **config.strategy.options,
    )


def client_ranks(config: RunConfig) -> tuple[int, ...]:
    """Return the ranks that are dealt to clients; empty where all take what the method sends, whatever its rank."""
    facts = find(config.strategy.name).capabilities
    if not facts.mixed_ranks:
        return ()
    return config.adapter.ranks or (() if facts.changes_rank else (config.adapter.rank,))


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
    client_ids: Mapping[int, str] | None = None,
    personal: Personal | None = None,
    timeout: float | None = None,
    books: Books | None = None,
    explain: Explain | None = None,
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
    client_ids : mapping of int to str, optional
        Client id of each node, where the grid is a simulation's.
    personal : callable, optional
        Gives the clients' personal tensors, where the server may see them: in a simulation.
    timeout : float, optional
        Seconds to wait for a round's replies; None waits for all.
    books : Books, optional
        Of what is spent, where the run is private.
    explain : callable, optional
        Says more of why a client raised than goes on record, where that may be known: in a simulation.
    """
    return _Run(config, grid, directory, listener, client_ids, personal, books, explain).go(timeout)


class _Run:
    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        directory: RunDirectory,
        listener: Listener,
        client_ids: Mapping[int, str] | None,
        personal: Personal | None,
        books: Books | None,
        explain: Explain | None,
    ) -> None:
        self.config, self.grid, self.directory, self.listener, self.personal = (
            config,
            grid,
            directory,
            listener,
            personal,
        )
        self.books, self.explain = books, explain
        self.home = resident(config)
        self.strategy = build_strategy(config, self.home, client_ids)
        self.strategy.on_update = self.client_done
        self.strategy.on_round = self.round_begins
        adapted = self.home.adapted
        self.personal_names = personal_names(self.strategy, adapted)
        # a personal factor is part of the server's adapter too, as drawn, since there is no layer without it
        self.initial = {name: tensor for name, tensor in adapted.initial.items() if name not in adapted.personal}
        self.state = AdapterState.from_tensors(self.initial, adapted.scaling)
        self.outcome = Outcome(directory.path)

    def go(self, timeout: float | None) -> Outcome:
        config, outcome = self.config, self.outcome
        try:
            self.strategy.start(
                self.grid,
                to_record(self.initial),
                config.federation.rounds,
                timeout,
                evaluate_fn=self.evaluate,
                observer=self.observe,
            )
        except KeyboardInterrupt:
            outcome.reason = "interrupted"
        except (TooFewClientsError, BudgetSpentError) as error:
            outcome.reason, outcome.error = str(error), error
            if (report := self.strategy.report) is not None:
                self.emit_faults(report)
                if why := next(filter(None, map(self.why, report.faults)), ""):
                    outcome.error = type(error)(f"{error} {why}")
        except BaseException as error:
            outcome.reason = "stopped" if isinstance(error, SystemExit) else type(error).__name__
            self.finish()
            raise
        self.finish()
        return outcome

    def emit(self, event: Event, **aside: str) -> None:
        """Record an event, and tell it; `aside` is for the listener's eyes."""
        self.directory.append(event)
        self.listener(event | aside)
        for problem in self.directory.take_problems():
            self.listener({"event": "warning", "round": event["round"], "message": problem})

    def emit_faults(self, report: RoundReport) -> None:
        if self.strategy.private_mean is not None and not self.config.privacy.release_metrics:
            # for the operator's eyes, and who it was not even there: who took part is on no record
            for reason in dict.fromkeys(fault.reason for fault in report.faults):
                message = f"round {report.server_round}: an answer that does not count: {reason}"
                self.listener({"event": "warning", "round": report.server_round, "message": message})
            return
        for fault in report.faults:
            event = {"event": "fault", "round": report.server_round, "client": fault.client_id, "reason": fault.reason}
            aside = {"why": why} if (why := self.why(fault)) else {}
            self.emit(event, **aside)

    def why(self, fault: Fault) -> str:
        """Say why a client raised, in words that are on no record, since they may quote its rows."""
        return self.explain(fault.client_id) if fault.raised and self.explain is not None else ""

    def round_begins(self, server_round: int) -> None:
        """Charge everybody for the round, where it is clients that are protected."""
        private = self.strategy.private_mean
        if self.books is not None and private is not None:
            self.books.begin_round(server_round, private.privacy.charge(self.config.federation.fraction))

    def settle(self, report: RoundReport | None) -> None:
        """Take in what sites say that a round cost, whether or not it came to its end."""
        if self.books is not None and report is not None:
            told = {update.client_id: update.metrics for update in report.updates}
            self.books.settle(report.server_round, report.asked, told)

    def client_done(self, server_round: int, update: ClientUpdate) -> None:
        """Record a client's good update as it arrives."""
        facts: Event = {"id": update.client_id, "num_examples": update.num_examples}
        facts |= {"loss": update.metrics.get(TRAIN_LOSS), "seconds": update.metrics.get(SECONDS)}
        self.emit({"event": "client", "round": server_round, **facts})

    def observe(self, report: RoundReport, state: AdapterState) -> None:
        """Record a round that is done."""
        self.state, self.outcome.rounds = state, report.server_round
        self.settle(report)
        self.emit_faults(report)
        event: Event = {
            "event": "round",
            "round": report.server_round,
            "train_loss": report.train_loss,
            "clients": len(report.updates),
            "failed": len(report.faults),
            "bytes_up": report.bytes_up,
            "bytes_down": report.bytes_down,
            "seconds": round(report.seconds, 3),
        }
        if self.strategy.private_mean is not None:  # how many took part is what amplification keeps secret
            event |= dict.fromkeys(("clients", "failed", "bytes_up", "bytes_down", "seconds"))
        elif self.strategy.capabilities.changes_base:
            event["bytes_catch_up"] = report.bytes_catch_up
        if self.books is not None:
            event["exhausted"] = report.exhausted if self.strategy.private_mean is None else None
            event["epsilon_max"] = self.books.epsilon_max()
        if report.aggregation_error is not None:
            event["aggregation_error"] = report.aggregation_error
            event["aggregation_error_of_total"] = report.aggregation_error_of_total
        self.emit(event)
        done, last = report.server_round, self.config.federation.rounds
        if done % self.config.run.checkpoint_every == 0 or done == last:
            facts = {"scaling": self.home.adapted.scaling, "strategy": self.strategy.name}
            self.directory.checkpoint(done, state.to_tensors() | self.strategy.memory(), facts)

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Score the adapter on the test split where this round is due."""
        every, last = self.config.run.evaluate_every, self.config.federation.rounds
        if server_round % every and server_round != last:
            return None
        metrics, details = self.score(to_tensors(arrays))
        self.outcome.scores = {"event": "evaluate", "round": server_round, "split": "test", **metrics, **details}
        self.emit(self.outcome.scores)
        return MetricRecord(dict(metrics))

    def score(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the test metrics, and those by domain and client."""
        adapted, test = self.home.adapted, self.home.test
        if not self.personal_names:
            adapted.load(tensors, adapted.scaling)
            scores = score(adapted.model, test, self.config)
            return scores.metrics(), self.details([scores])
        # personal parts: the score is the mean over the clients' own models
        held = self.personal() if self.personal is not None else {}
        drawn = {name: adapted.initial[name] for name in self.personal_names}
        every: list[Scores] = []
        for own in list(held.values()) or [drawn]:
            adapted.load({**tensors, **own}, adapted.scaling)
            every.append(score(adapted.model, test, self.config))
        return mean_metrics([scores.metrics() for scores in every]), self.details(every, list(held))

    def details(self, every: Iterable[Scores], owners: Sequence[str] = ()) -> dict[str, Any]:
        """Break test scores down by domain, and by client if asked: by its own model, where each has an owner."""
        models, test = list(every), self.home.test
        found: dict[str, Any] = {}
        if test.domains is not None:
            by_domain = [scores.by_group(test.domains) for scores in models]
            found["domains"] = {name: mean_metrics([groups[name] for groups in by_domain]) for name in by_domain[0]}
        if self.config.run.evaluate_clients:
            rows = (test, self.home.data.train, self.home.partition)
            clients: dict[str, dict[str, float]] = {}
            for name, own in zip(owners, models, strict=False):
                clients |= client_metrics(own, *rows, clients={name})
            if not owners:  # one model for all
                clients = client_metrics(models[0], *rows)
            key = "perplexity" if self.config.task == "causal-lm" else "accuracy"
            if clients:  # of no client are there test rows, else
                found["clients"] = {key: spread(clients, key), "scores": clients}
        return found

    def finish(self) -> None:
        """Write the adapter of the last round that was completed, and the end's event."""
        adapted, outcome = self.home.adapted, self.outcome
        drawn = {name: adapted.initial[name] for name in adapted.personal}
        labels = self.home.labels
        sum_of_all = exact_sum(self.state)
        whole = AdapterState(sum_of_all.factors, {**sum_of_all.dense, **drawn})
        self.directory.write_adapter(lambda path: adapted.save(path, whole, labels))
        for client, own in sorted((self.personal() if self.personal is not None else {}).items()):
            own_model = AdapterState.from_tensors({**self.state.to_tensors(), **drawn, **own}, adapted.scaling)
            personal = exact_sum(own_model)
            self.directory.write_adapter(
                lambda path, state=personal: adapted.save(path, state, labels), f"clients/{folder_name(client)}/adapter"
            )
        if self.books is not None:
            self.settle(self.strategy.report)
            self.emit({"event": "privacy", "round": outcome.rounds, **self.state_privacy(self.books)})
        if self.config.privacy.canaries:
            self.score_canaries()
        aside = {} if outcome.error is None else {"why": str(outcome.error)}
        self.emit({"event": "end", "round": outcome.rounds, "reason": outcome.reason}, **aside)

    def state_privacy(self, books: Books) -> Event:
        """Write the statement of what was spent; without it no epsilon is claimed."""
        try:
            kept = sorted({str(role_of(name)) for name in self.personal_names})
            clients = (self.strategy.client_ids or {}).values()
            facts = books.close(clients, kept, in_the_clear(self.home))
        except OSError as error:
            problem = f"no {PRIVACY}: {error.strerror or error}"
            self.listener({"event": "warning", "round": self.outcome.rounds, "message": problem})
            return {"epsilon_max": None, "guarantee": False, "statement": problem}
        told = {key: facts[key] for key in ("level", "epsilon_max", "delta", "guarantee", "statement")}
        with contextlib.suppress(OSError):  # of use to whoever is handed the adapter alone; the run has it whole
            text = to_json(told, indent=2) + "\n"
            (self.directory.path / ADAPTER / PRIVACY).write_text(text, encoding="utf-8")
        return told

    def score_canaries(self) -> None:
        """Write how well the last adapter knows the planted rows; a run is not lost because that failed."""
        try:
            write_scores(self.directory.path, self.home, self.initial, self.state.to_tensors())
        except OSError as error:
            message = f"no scores of the canaries, and no audit: {error.strerror or error}"
            self.listener({"event": "warning", "round": self.outcome.rounds, "message": message})
