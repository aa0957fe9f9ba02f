"""What is kept of a run while it goes on, each by a watcher of its own: events, books, adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.errors import BudgetSpentError, FedpeftError, Interruption, LedgerError, TooFewClientsError
from fedpeft.jsons import to_json
from fedpeft.privacy.accounting import Charge
from fedpeft.privacy.books import Books
from fedpeft.privacy.canaries import write_scores
from fedpeft.privacy.overlap import in_the_clear
from fedpeft.privacy.statement import PRIVACY
from fedpeft.resident import Resident
from fedpeft.runs import ADAPTER, ADAPTER_BEST, CLIENTS, Event, Listener, RunDirectory, folder_name
from fedpeft.strategies.algebra.base_changes import exact_sum
from fedpeft.strategies.rounds.ending import Best, EarlyEndError
from fedpeft.strategies.rounds.method import Method
from fedpeft.strategies.rounds.report import Fault, RoundReport
from fedpeft.strategies.rounds.watchers import Watcher

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
    exit_code : int
        How a command is to end that was interrupted.
    early : bool
        Whether it ended before its last round because its configuration asked for that.
    """

    path: Path
    rounds: int = 0
    scores: Event = field(default_factory=dict)
    reason: str = "completed"
    error: FedpeftError | None = None
    exit_code: int = 130
    early: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do: all rounds, or an end that the configuration asked for."""
        return self.early or self.reason == "completed"


class Journal:
    """A run's events: each is recorded in the run directory, then told to a listener."""

    def __init__(self, directory: RunDirectory, listener: Listener) -> None:
        self.directory, self.listener = directory, listener

    def emit(self, event: Event, **aside: str) -> None:
        """Record an event, and tell it; `aside` is for the listener's eyes."""
        self.directory.append(event)
        self.listener(event | aside)
        for problem in self.directory.take_problems():
            self.warn(event["round"], problem)

    def warn(self, server_round: int, message: str) -> None:
        """Tell what is on no record."""
        self.listener({"event": "warning", "round": server_round, "message": message})


class Records(Watcher):
    """Writes the events of rounds, clients, faults, scores and the end, and keeps how the run went.

    Parameters
    ----------
    journal : Journal
        Where events go.
    method : Method
        Merges.
    books : Books, optional
        Of what is spent, where the run is private.
    explain : callable, optional
        Says more of why a client raised than goes on record, where that may be known: in a simulation.
    withholds : bool
        Whether it is on no record who took part, as where clients are protected.
    """

    def __init__(
        self, journal: Journal, method: Method, books: Books | None, explain: Explain | None, withholds: bool
    ) -> None:
        self.journal, self.books, self.explain, self.withholds = journal, books, explain, withholds
        self.facts, self.protects_clients = method.capabilities, method.terms.client_privacy is not None
        self.outcome = Outcome(journal.directory.path)
        self.best: Best | None = None  # which adapter was the best, where that is asked for
        self.is_closed = False  # once the end is on record

    def update_arrived(self, server_round: int, update: ClientUpdate) -> None:
        """Record a client's good update as it arrives."""
        facts: Event = {"id": update.client_id, "num_examples": update.num_examples}
        facts |= {"loss": update.metrics.loss, "seconds": update.metrics.seconds}
        self.journal.emit({"event": "client", "round": server_round, **facts})

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        """Record a round that is done."""
        self.outcome.rounds = report.server_round
        self._faults(report)
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
        if self.protects_clients:  # how many took part is what amplification keeps secret
            event |= dict.fromkeys(("clients", "failed", "bytes_up", "bytes_down", "seconds"))
        elif self.facts.changes_base:
            event["bytes_catch_up"] = report.bytes_catch_up
        if self.books is not None:
            event["exhausted"] = None if self.protects_clients else report.exhausted
            event["epsilon_max"] = self.books.epsilon_max()
        if report.aggregation_error is not None:
            event["aggregation_error"] = report.aggregation_error
            event["aggregation_error_of_total"] = report.aggregation_error_of_total
        if report.aggregation_error_layers is not None:
            event["aggregation_error_layers"] = report.aggregation_error_layers
        self.journal.emit(event)

    def round_broken(self, report: RoundReport, error: BaseException) -> None:
        """Record why a round failed, where clients did."""
        if isinstance(error, TooFewClientsError | BudgetSpentError):
            self._faults(report)
            if why := next(filter(None, map(self._why, report.faults)), ""):
                self.outcome.error = type(error)(f"{error} {why}")

    def scored(self, server_round: int, metrics: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Record test scores."""
        self.outcome.scores = {"event": "evaluate", "round": server_round, "split": "test", **metrics, **details}
        self.journal.emit(self.outcome.scores)

    def memory(self) -> Event:
        """Return the last scores."""
        return {"scores": self.outcome.scores}

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Go on from a round."""
        self.outcome.rounds, self.outcome.scores = server_round, dict(memory["scores"])

    def ended(self, error: BaseException | None) -> None:
        """Record the end, and its reason."""
        outcome = self.outcome
        if isinstance(error, Interruption):
            outcome.exit_code = error.exit_code
        if isinstance(error, TooFewClientsError | BudgetSpentError):
            outcome.reason, outcome.error = str(error), outcome.error or error
        elif isinstance(error, KeyboardInterrupt):
            outcome.reason = "interrupted"
        elif isinstance(error, EarlyEndError):
            outcome.reason, outcome.early = str(error), True
        elif error is not None:
            outcome.reason = "stopped" if isinstance(error, SystemExit) else type(error).__name__
        aside = {} if outcome.error is None else {"why": str(outcome.error)}
        event: Event = {"event": "end", "round": outcome.rounds, "reason": outcome.reason}
        if outcome.early:
            event["early"] = True
        self.journal.emit(event | ({} if self.best is None else self.best.facts), **aside)
        self.is_closed = True

    def _faults(self, report: RoundReport) -> None:
        if self.withholds:  # for the operator's eyes, and who it was not even there: who took part is on no record
            for reason in dict.fromkeys(fault.reason for fault in report.faults):
                message = f"round {report.server_round}: an answer that does not count: {reason}"
                self.journal.warn(report.server_round, message)
            return
        for fault in report.faults:
            event = {"event": "fault", "round": report.server_round, "client": fault.client_id, "reason": fault.reason}
            self.journal.emit(event, **({"why": why} if (why := self._why(fault)) else {}))

    def _why(self, fault: Fault) -> str:
        """Say why a client raised, in words that are on no record, since they may quote its rows."""
        return self.explain(fault.client_id) if fault.raised and self.explain is not None else ""


class Spending(Watcher):
    """Keeps a private run's books, and writes the statement of what was spent at its end.

    `charge` is that of a round for everybody, where it is clients that are protected; `facts` gives, at the end, the
    clients that are known, and the kinds of tensors that stay with them.
    """

    def __init__(
        self,
        journal: Journal,
        books: Books,
        home: Resident,
        charge: Charge | None,
        facts: Callable[[], tuple[Sequence[str], Sequence[str]]],
    ) -> None:
        self.journal, self.books, self.home, self.charge, self.facts = journal, books, home, charge, facts
        self.rounds = 0

    def round_begins(self, server_round: int) -> None:
        """Charge everybody for the round, where it is clients that are protected."""
        if self.charge is not None:
            self.books.begin_round(server_round, self.charge)

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        """Take in what sites say that a round cost."""
        self.rounds = report.server_round
        self._settle(report)

    def round_broken(self, report: RoundReport, error: BaseException) -> None:
        """Take in what a round cost that came to no end."""
        self._settle(report)

    def memory(self) -> Event:
        """Return what the books know beside the ledger."""
        return self.books.memory()

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Go on with the books as they were; nothing that is in the ledger is taken back."""
        self.rounds = server_round
        self.books.recall(memory)

    def _settle(self, report: RoundReport) -> None:
        self.books.settle(report.server_round, report.asked, report.updates)

    def ended(self, error: BaseException | None) -> None:
        """Write the statement of what was spent; without it no epsilon is claimed."""
        clients, personal = self.facts()
        try:
            facts = self.books.close(clients, personal, in_the_clear(self.home))
        except (OSError, LedgerError) as failed:  # a ledger on a full disk may not even be read
            problem = f"no {PRIVACY}: {getattr(failed, 'strerror', None) or failed}"
            self.journal.warn(self.rounds, problem)
            statement: Event = {"epsilon_max": None, "guarantee": False, "statement": problem}
        else:
            statement = {key: facts[key] for key in ("level", "epsilon_max", "delta", "guarantee", "statement")}
            text = to_json(statement, indent=2) + "\n"
            for folder in (ADAPTER, ADAPTER_BEST):  # of use to whoever is handed an adapter alone; the run has it whole
                with contextlib.suppress(OSError):  # as where no best adapter is asked for
                    (self.journal.directory.path / folder / PRIVACY).write_text(text, encoding="utf-8")
        self.journal.emit({"event": "privacy", "round": self.rounds, **statement})


class Adapters(Watcher):
    """Writes the adapter of the last round that was completed, and each client's own where the server may see it."""

    def __init__(self, directory: RunDirectory, home: Resident, state: AdapterState, personal: Personal | None) -> None:
        self.directory, self.home, self.state, self.personal = directory, home, state, personal

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        """Remember the adapter."""
        self.state = state

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Remember the adapter."""
        self.state = state

    def ended(self, error: BaseException | None) -> None:
        """Write them."""
        adapted, labels = self.home.adapted, self.home.labels
        drawn = {name: adapted.initial[name] for name in adapted.personal}
        self.write(self.state, ADAPTER)
        own = self.personal() if self.personal is not None else {}
        for client in sorted(own):  # read one by one
            model = AdapterState.from_tensors({**self.state.to_tensors(), **drawn, **own[client]}, adapted.scaling)
            personal = exact_sum(model)
            self.directory.write_adapter(
                lambda path, state=personal: adapted.save(path, state, labels),
                f"{CLIENTS}/{folder_name(client)}/{ADAPTER}",
            )

    def write(self, state: AdapterState, name: str) -> None:
        """Write an adapter that all clients share to a folder of the run."""
        adapted = self.home.adapted
        sum_of_all = exact_sum(state)
        drawn = {name: adapted.initial[name] for name in adapted.personal}
        whole = AdapterState(sum_of_all.factors, {**sum_of_all.dense, **drawn})
        self.directory.write_adapter(lambda path: adapted.save(path, whole, self.home.labels), name)


class PlantedRows(Watcher):
    """Scores the canaries at the end: how well the last adapter knows the planted rows. `initial` is the first one."""

    def __init__(self, journal: Journal, home: Resident, initial: Mapping[str, Tensor]) -> None:
        self.journal, self.home, self.initial, self.last = journal, home, initial, initial
        self.rounds = 0

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        """Remember the adapter."""
        self.rounds, self.last = report.server_round, state.to_tensors()

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Remember the adapter."""
        self.rounds, self.last = server_round, state.to_tensors()

    def ended(self, error: BaseException | None) -> None:
        """Write what the audit reads."""
        try:
            write_scores(self.journal.directory.path, self.home, self.initial, self.last)
        except OSError as failed:
            self.journal.warn(self.rounds, f"no scores of the canaries, and no audit: {failed.strerror or failed}")
