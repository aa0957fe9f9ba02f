"""The rounds of a run: who is asked, in what order replies count, which are refused, and what a round reports.

Sampling, seeds and the order of sums follow the CLIENT's id, never a node's, so that a simulation and a deployment give
the same bytes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedpeft.adapters.state import A_SUFFIX, AdapterState, ClientUpdate, Role, TrainMetrics, role_of
from fedpeft.config import cohort_size
from fedpeft.errors import ConfigError, TooFewClientsError, nearest
from fedpeft.seeds import generator
from fedpeft.strategies.averaging.private_mean import PrivateMean
from fedpeft.strategies.rounds.answers import Answers, known_clients
from fedpeft.strategies.rounds.exchange import Exchange
from fedpeft.strategies.rounds.measuring import ErrorMeasure
from fedpeft.strategies.rounds.memory import MEAN, METHOD, WATCHER, Memory, remember
from fedpeft.strategies.rounds.method import Method
from fedpeft.strategies.rounds.outgoing import Outgoing
from fedpeft.strategies.rounds.ranks import Ranks, cut
from fedpeft.strategies.rounds.report import Fault, RoundReport, client_order, require_enough
from fedpeft.strategies.rounds.updates import RefusedUpdateError, read_update
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import NUM_ROUNDS, TRAIN_LOSS, TrainAnswer, to_record, to_tensors

# of a round and its adapter, the metrics and what they are over parts of the rows; None where it is not evaluated
Evaluate = Callable[[int, ArrayRecord], tuple[Mapping[str, Any], Mapping[str, Any]] | None]


class Loop:
    """One run of a method on a grid, and the state of its rounds.

    Parameters
    ----------
    method : Method
        Merges; its ``terms`` are the run's.
    grid : flwr.serverapp.Grid
        Where the clients are.
    initial : flwr.app.ArrayRecord
        The whole adapter by PEFT's names, frozen tensors included.
    timeout : float, optional
        Seconds to wait for a round's replies; None waits for all.
    watchers : iterable of Watcher
        Who is told, in this order.

    Attributes
    ----------
    report : RoundReport or None
        Of the round that clients were asked in last.
    client_ids : dict of int to str
        Client id of each node that is known.
    done : int
        Rounds that are over.
    """

    def __init__(
        self,
        method: Method,
        grid: Grid,
        initial: ArrayRecord,
        timeout: float | None = 3600.0,
        watchers: Iterable[Watcher] = (),
    ) -> None:
        terms, tensors = method.terms, to_tensors(initial)
        self._initial, self._frozen = initial, frozenset(terms.frozen)
        if strangers := self._frozen - tensors.keys():
            raise ConfigError(
                f"frozen names '{min(strangers)}', which the initial arrays lack. {nearest(min(strangers), tensors)}"
            )
        self.method, self.terms, self.grid, self.timeout = method, terms, grid, timeout
        self.watchers = list(watchers)
        self.report: RoundReport | None = None
        self.client_ids = dict(terms.client_ids)
        self._ranks = Ranks(terms.ranks, terms.scaling_at) if terms.ranks else None
        self._private = None if terms.client_privacy is None else PrivateMean(terms.client_privacy, terms.seed)
        self._outgoing = Outgoing(AdapterState.from_tensors(tensors, terms.scaling), method)
        self._sent: list[Message] = []
        self._known: dict[int, str] = {}
        self._nodes: dict[str, int] = {}
        self._in_order: list[str] = []
        self._started = 0.0
        self.done = 0

    def run(
        self, num_rounds: int, train_config: ConfigRecord | None = None, evaluate: Evaluate | None = None
    ) -> Result:
        """Hold all rounds, and return what Flower's strategies return.

        Parameters
        ----------
        num_rounds : int
            How many.
        train_config : flwr.app.ConfigRecord, optional
            Passed on to clients.
        evaluate : callable, optional
            Called before the first round and after each.

        Notes
        -----
        After `recall`, rounds go on where they were.
        """
        result = Result()
        config = ConfigRecord({**(train_config or {}), NUM_ROUNDS: num_rounds})
        try:
            if self.done:
                result.arrays = arrays = to_record(self._outgoing.view(0).to_tensors())
            else:
                arrays = self._initial
                self._score(0, arrays, evaluate, result)
            for server_round in range(self.done + 1, num_rounds + 1):
                arrays, metrics = self._round(server_round, arrays, config)
                result.arrays, result.train_metrics_clientapp[server_round] = arrays, metrics
                self._score(server_round, arrays, evaluate, result)
                self.done = server_round
                for watcher in self.watchers:
                    watcher.round_closed(server_round)
        except BaseException as error:
            for watcher in self.watchers:
                watcher.ended(error)
            raise
        for watcher in self.watchers:
            watcher.ended(None)
        return result

    def _round(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> tuple[ArrayRecord, MetricRecord]:
        try:
            messages = self.ask(server_round, arrays, config)
            replies = self.grid.send_and_receive(messages, timeout=self.timeout) if messages else []
            merged = self.merge(replies)
            assert self.report is not None
            for watcher in self.watchers:
                watcher.round_done(self.report, self._outgoing.view(0))
        except BaseException as error:
            if self.report is not None:
                for watcher in self.watchers:
                    watcher.round_broken(self.report, error)
            raise
        return merged

    def _score(self, server_round: int, arrays: ArrayRecord, evaluate: Evaluate | None, result: Result) -> None:
        scores = None if evaluate is None else evaluate(server_round, arrays)
        if scores is not None:
            metrics, details = scores
            result.evaluate_metrics_serverapp[server_round] = MetricRecord(dict(metrics))
            for watcher in self.watchers:
                watcher.scored(server_round, metrics, details)

    # --- a round ---------------------------------------------------------------------------------------------------

    def ask(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> list[Message]:
        """Draw the round's cohort and address one message to each member, in the order of client ids."""
        self.report, self._sent, self._started = None, [], time.perf_counter()
        for watcher in self.watchers:
            watcher.round_begins(server_round)
        nodes, everyone = self._everyone()
        require_enough(len(everyone), self.terms.min_clients)
        self.method.clients = len(everyone)
        cohort = self._draw(everyone, server_round)
        if self._ranks is not None:
            self._ranks.deal(everyone)
        self._outgoing.begin(server_round, arrays, config)
        contents = [self._outgoing.content(client, self._rank(client)) for client in cohort]
        self.report = RoundReport(server_round, asked=Counter(cohort))  # whoever is interrupted from here on has asked
        self._sent = [
            Message(content, nodes[client], MessageType.TRAIN, group_id=str(server_round))
            for client, content in zip(cohort, contents, strict=True)
        ]
        return self._sent

    def _everyone(self) -> tuple[Mapping[str, int], Sequence[str]]:
        """Return the node of each client that is there, and all clients in the order of their ids."""
        known = known_clients(self.grid, self.client_ids, self.timeout)
        if known != self._known:  # else a hundred thousand clients are not sorted again in every round
            self._known = known
            self._nodes = {client: node for node, client in known.items()}
            self._in_order = sorted(self._nodes, key=client_order)
        return self._nodes, self._in_order

    def _draw(self, everyone: Sequence[str], server_round: int) -> list[str]:
        terms, private = self.terms, self._private
        if private is not None and private.privacy.cohort == "poisson":
            return private.draw(everyone, terms.fraction_train, server_round)
        size = cohort_size(len(everyone), terms.fraction_train, terms.min_clients)
        if private is None:
            self.method.check_cohort(self.method.options, size)
        else:
            private.expected = size  # the method sees one client, whatever the cohort
        drawn = generator(terms.seed, "cohort", server_round).choice(len(everyone), size, replace=False)
        return [everyone[index] for index in sorted(drawn)]

    def _rank(self, client: str) -> int:
        return 0 if self._ranks is None else self._ranks.of[client]

    def merge(self, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Validate each reply as it arrives, fold the good ones in, and finish the round that was asked for last.

        Raises
        ------
        TooFewClientsError
            Fewer good updates than ``min_clients``, or a merged adapter that is not finite.
        """
        report, state = self.report, self._outgoing.view(0)
        assert report is not None, "ask() begins a round"
        exchange = self.method.exchange(report.server_round)
        # under privacy, what follows from single updates may not be told: the error, who answered, their losses
        measured = self.terms.measure_error and self._private is None and _has_products(state, exchange)
        measure = ErrorMeasure(state, len(self._sent), self.terms.seed) if measured else None
        stream = self._good(replies, exchange, report, measure)
        if self._private is not None:
            names = exchange.sent_up(list(state.adapter_tensors()), self._frozen)
            stream = iter([self._private.as_one_client(stream, state, names, report.server_round)])
        first = next(stream, None)
        merged = None
        if first is not None:
            merged = self.method.aggregate(chain([first], stream), state, report.server_round)
        report.seconds = time.perf_counter() - self._started
        self._require_good(merged, report)
        assert merged is not None
        if measure is not None:
            errors = measure.errors(merged, self.terms.offset)
            report.aggregation_error, report.aggregation_error_of_total = errors.of_step, errors.of_total
            report.aggregation_error_layers = len(measure.layers) if measure.is_sample else None
        report.seconds = time.perf_counter() - self._started
        self._outgoing.update(merged)
        metrics = MetricRecord({} if report.train_loss is None else {TRAIN_LOSS: report.train_loss})
        return to_record(merged.to_tensors()), metrics

    def _good(
        self, replies: Iterable[Message], exchange: Exchange, report: RoundReport, measure: ErrorMeasure | None
    ) -> Iterator[ClientUpdate]:
        """Yield good updates as they arrive, note all in the report, and show them to `measure` if given."""
        private = self._private is not None
        answers = Answers(self.grid, self.timeout, self._outgoing, self.client_ids, self.terms.stop_when_spent)
        for client, answer in answers.good(self._sent, replies, report):
            try:
                update = self._read(client, answer, exchange)
            except RefusedUpdateError as error:
                report.faults.append(Fault(client, f"update refused: {error}"))
                continue
            facts = ClientUpdate(client, update.num_examples, {}, {}, TrainMetrics() if private else update.metrics)
            report.updates.append(facts)
            for watcher in () if private else self.watchers:
                watcher.update_arrived(report.server_round, facts)
            if measure is not None:
                measure.add(update)
            yield update

    def _read(self, client: str, answer: TrainAnswer, exchange: Exchange) -> ClientUpdate:
        """Read an answer, of the rank that the client was sent or of one that it may have come to."""
        asked = self._outgoing.asked(client)
        view, rank, scaling = (
            self._outgoing.view(asked),
            self._answered_rank(asked, answer),
            self.terms.scaling_at(asked),
        )
        rest = (view if rank == asked else cut(view, rank, scaling)).adapter_tensors()
        expected = {name: rest.pop(name) for name in exchange.sent_up(list(rest), self._frozen)}
        update = read_update(answer, client, expected, rest, scaling)
        if self._ranks is not None:
            self._ranks.of[client] = rank
        return update

    def _answered_rank(self, asked: int, answer: TrainAnswer) -> int:
        """Return the rank of an answer's factors, where a client sent `asked` may answer with it."""
        ranks = {array.shape[0] for name, array in answer.arrays.items() if name.endswith(A_SUFFIX) and array.shape}
        return next((rank for rank in self.method.accepted_ranks(asked) if ranks == {rank}), asked)

    def _require_good(self, merged: AdapterState | None, report: RoundReport) -> None:
        saved = "What was done before this round is saved."
        # under privacy, no answer counts as zero
        too_few = self._private is None and len(report.updates) < self.terms.min_clients
        if too_few or merged is None:
            reasons = "; ".join(f"client {fault.client_id}: {fault.reason}" for fault in report.faults[:3])
            raise TooFewClientsError(
                f"round {report.server_round}: {len(report.updates)} good updates, but federation.min_clients = "
                f"{self.terms.min_clients} are needed ({reasons or 'nobody answered'}). {saved}"
            )
        if bad := [name for name, tensor in merged.to_tensors().items() if not torch.isfinite(tensor).all()]:
            raise TooFewClientsError(
                f"round {report.server_round}: the merged adapter holds NaN or infinity in {bad[0]}; "
                f"lower train.learning_rate. {saved}"
            )

    # --- from one process to the next ------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """Return all that the rounds to come depend on, and what the watchers remember."""
        return remember(
            self._outgoing.view(0),
            {
                METHOD: self.method.memory(),
                MEAN: {} if self._private is None else self._private.memory(),
                WATCHER: {name: tensor for watcher in self.watchers for name, tensor in watcher.tensors().items()},
            },
            {
                "outgoing": self._outgoing.memory(),
                "ranks": {} if self._ranks is None else dict(self._ranks.of),  # pruning changes them
                "watchers": {type(watcher).__name__: watcher.memory() for watcher in self.watchers},
            },
        )

    def recall(self, server_round: int, memory: Memory) -> None:
        """Take up what `memory` returned after a round; `run` then goes on after it, as if there had been no end.

        Raises
        ------
        CheckpointError
            It is another method's.
        """
        state = memory.state()
        self.method.recall(memory.part(METHOD))
        if self._private is not None:
            self._private.recall(memory.part(MEAN))
        if self._ranks is not None:
            self._ranks.of = {str(client): int(rank) for client, rank in memory.facts["ranks"].items()}
        self._outgoing.recall(state, memory.facts["outgoing"])
        self.done = server_round
        for watcher in self.watchers:
            watcher.resumed(server_round, state, memory.facts["watchers"].get(type(watcher).__name__, {}))
            if watcher.tensors():
                watcher.recall_tensors(memory.part(WATCHER))


def _has_products(state: AdapterState, exchange: Exchange) -> bool:
    """Tell whether the clients' updates are products of factors that the server comes to know."""
    others = any(role_of(name) is Role.PARAMETER for name in state.dense)
    return bool(state.factors) and not others and not exchange.personal & {Role.A, Role.B, Role.R}
