"""What all methods share: options, the capability record, and the one Flower strategy that they extend.

A method says how a cohort's updates become the next adapter (`AdapterStrategy.aggregate`); who is asked, in what order
replies count, which replies are refused and what a round reports is said here once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from pydantic import ValidationError
from torch import Tensor

from fedpeft.config import AdapterConfig, Section, cohort_size, describe
from fedpeft.errors import ConfigError, DeploymentError, TooFewClientsError, nearest
from fedpeft.kinds import ADDITIVE_KINDS
from fedpeft.seeds import generator
from fedpeft.state import A_SUFFIX, BASE_EARLIER, AdapterState, ClientUpdate, Role
from fedpeft.strategies.exchange import Deliveries, Exchange
from fedpeft.strategies.factors import aggregation_error, sent_products
from fedpeft.strategies.ranks import Ranks, cut
from fedpeft.strategies.rounds import Fault, Observer, RoundReport, client_order, error_class, in_order, require_enough
from fedpeft.strategies.updates import RefusedUpdateError, read_update
from fedpeft.wire import (
    ARRAYS,
    CLIENT_ID,
    CONFIG,
    DRAW,
    HELD_HASH,
    KEPT,
    NEEDS_ARRAYS,
    NUM_ROUNDS,
    PERSONAL,
    RANK,
    ROUND,
    SCALING,
    TRAIN_LOSS,
    TRAINED,
    payload_bytes,
    to_record,
    to_tensors,
)

log = logging.getLogger(__name__)


class StrategyOptions(Section):
    """The options of one method, under ``[strategy]`` in a configuration; closed to unknown keys."""


@dataclass(frozen=True)
class Capabilities:
    """What a method does, from which tables, refusals and byte counts derive.

    Parameters
    ----------
    paper : str
        arXiv number or venue.
    sends : str
        What the server sends down, in the paper's symbols.
    exact : str
        When the sent product equals the weighted mean of the clients' products.
    needs_single_factors : bool
        Whether the server must see single clients' factors; if not, sums suffice.
    trains : str
        What clients train, besides the head.
    personal : frozenset of Role
        What stays with each client; where there is such, scores are means over the clients' own models.
    changes_rank : bool
        Whether what is sent may have another rank than the clients' adapters had at first.
    mixed_ranks : bool
        Whether clients may have different ranks.
    changes_base : bool
        Whether the frozen base moves too; clients are then sent its change.
    init : str
        The ``adapter.init`` that the method is defined with; any if empty.
    kinds : frozenset of str
        The ``adapter.kind`` that the method can merge.
    """

    paper: str
    sends: str
    exact: str
    needs_single_factors: bool
    trains: str = "A, B"
    personal: frozenset[Role] = frozenset()
    changes_rank: bool = False
    mixed_ranks: bool = False
    changes_base: bool = False
    init: str = ""
    kinds: frozenset[str] = ADDITIVE_KINDS


class AdapterStrategy(Strategy):
    """Base of all methods; a Flower strategy whose ``start`` runs a whole federation.

    Sampling, seeds and the order of sums follow the CLIENT's id, never a node's, so that a simulation and a deployment
    give the same bytes.

    Parameters
    ----------
    fraction_train : float
        Share of the clients drawn each round, without replacement.
    min_clients : int
        Fewest good updates that make a round.
    seed : int
        The run's seed.
    scaling : float
        alpha / r of the clients' adapters.
    frozen : collection of str
        Names in the initial arrays that nobody trains, such as FFA-LoRA's A: only their hash travels, unless a client
        turns out to have drawn others.
    client_ids : mapping of int to str, optional
        Client id of each node; where it is not given, each node is asked once by a ``query`` message.
    measure_error : bool
        Whether to compute the aggregation error, which keeps all the cohort's factors until the end of the round.
    ranks : sequence of int
        Ranks of the clients, dealt in turn, where they differ; see `fedpeft.strategies.ranks`.
    scaling_of : callable, optional
        Scaling of a client of some rank; ``alpha / rank``, with the alpha that `scaling` speaks of, if not given.
    **options
        The method's own, see its ``Options``.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions

    def __init__(
        self,
        *,
        fraction_train: float = 1.0,
        min_clients: int = 1,
        seed: int = 0,
        scaling: float = 1.0,
        frozen: Collection[str] = (),
        client_ids: Mapping[int, str] | None = None,
        measure_error: bool = True,
        ranks: Sequence[int] = (),
        scaling_of: Callable[[int], float] | None = None,
        **options: Any,
    ) -> None:
        self.fraction_train = fraction_train
        self.min_clients = min_clients
        self.seed = seed
        self.scaling = scaling
        self.frozen_names = frozenset(frozen)
        self.client_ids = None if client_ids is None else dict(client_ids)
        self.measure_error = measure_error
        alpha = scaling * max(ranks, default=1)
        self.ranks = Ranks(ranks, scaling_of or (lambda rank: alpha / rank)) if ranks else None
        self.options = self.parse_options(options)
        self.trains_a = not any(name.endswith(A_SUFFIX) for name in self.frozen_names)
        self.report: RoundReport | None = None
        self.on_update: Callable[[int, ClientUpdate], None] | None = None  # called as each good update arrives
        self.server_round = 0  # of the last round begun
        self._deliveries: dict[int, Deliveries] = {}  # by rank; 0 is the adapter's own
        self._asked: dict[str, int] = {}  # the rank that each member of the cohort was sent
        self._views: dict[int, AdapterState] = {}  # what clients of a rank are sent in this round
        self._state: AdapterState | None = None
        self._timeout: float | None = 3600.0
        self._started = time.perf_counter()
        self._grid: Grid | None = None
        self._sent: list[Message] = []

    @classmethod
    def parse_options(cls, options: Mapping[str, Any]) -> Any:
        """Check the method's options.

        Raises
        ------
        ConfigError
            An option that the method does not have, or a value out of range.
        """
        for key in options:
            if key not in cls.Options.model_fields:
                known = nearest(key, cls.Options.model_fields)
                raise ConfigError(f"strategy '{cls.name}' has no option '{key}'. {known}")
        try:
            return cls.Options.model_validate(dict(options))
        except ValidationError as error:
            raise ConfigError(describe(error, "strategy")) from None

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig) -> None:
        """Raise ConfigError if these options cannot work with this adapter; a method that minds overrides it."""

    # --- what a method defines -----------------------------------------------------------------------------------

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Say what the clients of a round train, keep and send; all of it, unless a method says otherwise."""
        return Exchange()

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState) -> AdapterState:
        """Merge the cohort's updates, in their order, into the adapter that the next round starts from.

        Parameters
        ----------
        updates : iterable of ClientUpdate
            A stream: a method that needs sums only should not keep them.
        current : AdapterState
            What the round started from.
        """
        raise TypeError(f"{type(self).__name__} does not define aggregate")

    def check_cohort(self, clients: int) -> None:
        """Raise ConfigError if the method cannot merge a cohort of this size; called before anybody trains."""

    def view(self, state: AdapterState, rank: int, scaling: float) -> AdapterState:
        """Return what a client of a rank below the adapter's is sent: the first ranks, unless a method says otherwise.

        Parameters
        ----------
        state : AdapterState
            The adapter at its full rank.
        rank : int
            The client's.
        scaling : float
            What the client multiplies its product with.
        """
        return cut(state, rank, scaling)

    def accepted_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that a client may answer with that was sent `rank`; its scaling stays that of `rank`."""
        return (rank,)

    def client_settings(self, rank: int) -> dict[str, float]:
        """Return what a client of a rank is told besides, under keys of `fedpeft.wire`."""
        return {}

    @classmethod
    def step_size(cls, d_in: int, d_out: int, ranks: Sequence[int]) -> int:
        """Return how many numbers of a layer's last change of the base are sent, for clients of these ranks."""
        return 0

    def memory(self) -> dict[str, Tensor]:
        """Return what the method remembers from round to round besides the adapter, for checkpoints."""
        return {}

    # --- Flower's strategy ---------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Log what the method is and how it was configured."""
        log.info("%s (%s) with %s", self.name, self.capabilities.paper, self.options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the round's cohort and address one message to each member, in the order of client ids."""
        self.server_round = server_round
        nodes = {client: node for node, client in self._clients(grid).items()}
        everyone = sorted(nodes, key=client_order)
        require_enough(len(everyone), self.min_clients)
        size = cohort_size(len(everyone), self.fraction_train, self.min_clients)
        self.check_cohort(size)
        drawn = generator(self.seed, "cohort", server_round).choice(len(everyone), size, replace=False)
        if self.ranks is not None:
            self.ranks.deal(everyone)
        self._views = {0: self._require_state()}
        records = {0: arrays}
        contents: dict[tuple[int, frozenset[str]], RecordDict] = {}  # clients that lack the same share one content
        messages = []
        for client in (everyone[index] for index in sorted(drawn)):
            rank = self._asked[client] = 0 if self.ranks is None else self.ranks.of[client]
            if rank not in records:
                records[rank] = to_record(self._view(rank).to_tensors())
            names = frozenset(self._held_by(rank).lacking(client, self.exchange(server_round)))
            if (rank, names) not in contents:
                contents[rank, names] = self._content(rank, names, records[rank], config)
            content = contents[rank, names]
            messages.append(Message(content, nodes[client], MessageType.TRAIN, group_id=str(server_round)))
        return messages

    def _content(self, rank: int, names: Collection[str], arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        exchange = self.exchange(self.server_round)
        settings = ConfigRecord(
            {
                **config,
                ROUND: self.server_round,
                RANK: rank,
                SCALING: self._scaling(rank),
                HELD_HASH: self._held_by(rank).held_hash(names, exchange),
                TRAINED: _listed(exchange.trained),
                PERSONAL: _listed(exchange.personal),
                KEPT: _listed(exchange.kept),
                DRAW: exchange.draw,
                **self.client_settings(rank),
            }
        )
        sent = ArrayRecord({name: array for name, array in arrays.items() if name in names})
        return RecordDict({ARRAYS: sent, CONFIG: settings})

    # --- the adapter as clients of a rank see it; rank 0 is the whole ----------------------------------------------

    def _require_state(self) -> AdapterState:
        assert self._state is not None, "start() sets the adapter that the first round begins with"
        return self._state

    def _scaling(self, rank: int) -> float:
        return self.ranks.scaling_of(rank) if rank and self.ranks is not None else self.scaling

    def _view(self, rank: int) -> AdapterState:
        if rank not in self._views:
            self._views[rank] = self.view(self._require_state(), rank, self._scaling(rank))
        return self._views[rank]

    def _held_by(self, rank: int) -> Deliveries:
        if rank not in self._deliveries:
            self._deliveries[rank] = Deliveries(self._view(rank).to_tensors(), self.exchange(1), self.frozen_names)
        return self._deliveries[rank]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate each reply as it arrives, fold the good ones in, and finish the round."""
        state = self._require_state()
        report = self.report = RoundReport(server_round)
        started = self._started
        kept: list[ClientUpdate] = []
        exchange = self.exchange(server_round)
        measured = self.measure_error and bool(state.factors) and not exchange.personal & {Role.A, Role.B, Role.R}

        def read(client: str, reply: Message) -> ClientUpdate:
            asked = self._asked[client]
            rank = self._answered_rank(asked, reply)
            view = self._view(asked)
            held = (view if rank == asked else cut(view, rank, self._scaling(asked))).adapter_tensors()
            expected = {name: held.pop(name) for name in exchange.sent_up(list(held), self.frozen_names)}
            update = read_update(reply, client, expected, held, self._scaling(asked))
            if self.ranks is not None:
                self.ranks.of[client] = rank
            return update

        def good() -> Iterator[ClientUpdate]:
            for client, reply in self._answers(replies, report):
                try:
                    update = read(client, reply)
                except RefusedUpdateError as error:
                    report.faults.append(Fault(client, f"update refused: {error}"))
                    continue
                report.updates.append(ClientUpdate(client, update.num_examples, {}, {}, update.metrics))
                if self.on_update is not None:
                    self.on_update(server_round, report.updates[-1])
                if measured:
                    kept.append(ClientUpdate(client, update.num_examples, update.factors))
                yield update

        stream = good()
        first = next(stream, None)
        if first is not None:
            merged = self.aggregate(_chain(first, stream), state)
        report.seconds = time.perf_counter() - started
        if len(report.updates) < self.min_clients or first is None:
            reasons = "; ".join(f"client {fault.client_id}: {fault.reason}" for fault in report.faults[:3])
            raise TooFewClientsError(
                f"round {server_round}: {len(report.updates)} good updates, but federation.min_clients = "
                f"{self.min_clients} are needed ({reasons or 'nobody answered'}). "
                "What was done before this round is saved."
            )
        tensors = merged.to_tensors()
        if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise TooFewClientsError(
                f"round {server_round}: the merged adapter holds NaN or infinity in {bad[0]}; "
                "lower train.learning_rate. What was done before this round is saved."
            )
        if measured:
            report.aggregation_error = aggregation_error(kept, sent_products(merged))
        report.seconds = time.perf_counter() - started
        self._state = merged
        self._views = {0: merged}
        for rank, deliveries in self._deliveries.items():
            deliveries.update(self._view(rank).to_tensors())
        metrics = MetricRecord({} if report.train_loss is None else {TRAIN_LOSS: report.train_loss})
        return to_record(tensors), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates, on rows of its own."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Report nothing: nobody was asked."""
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        observer: Observer | None = None,
    ) -> Result:
        """Run the federation.

        Parameters
        ----------
        grid : flwr.serverapp.Grid
            A SuperLink's, or one of `fedpeft.simulations`.
        initial_arrays : flwr.app.ArrayRecord
            The whole adapter by PEFT's names, frozen tensors included.
        num_rounds : int
            Rounds of training.
        timeout : float, optional
            Seconds to wait for a round's replies; None waits for all.
        train_config : flwr.app.ConfigRecord, optional
            Passed on to clients.
        evaluate_config : flwr.app.ConfigRecord, optional
            Must be empty: clients are not asked to evaluate.
        evaluate_fn : callable, optional
            Called before the first round and after each with the whole adapter.
        observer : callable, optional
            Called after each round with its report and the new adapter, before ``evaluate_fn``.

        Raises
        ------
        TooFewClientsError
            A round with fewer good updates than ``min_clients``.
        """
        if evaluate_config:
            raise ConfigError("evaluate_config: clients are not asked to evaluate; pass evaluate_fn instead.")
        self.summary()
        tensors = to_tensors(initial_arrays)
        if strangers := self.frozen_names - tensors.keys():
            raise ConfigError(
                f"frozen names '{min(strangers)}', which the initial arrays lack. {nearest(min(strangers), tensors)}"
            )
        self._state = AdapterState.from_tensors(tensors, self.scaling)
        self._views, self._deliveries = {0: self._state}, {}
        self._grid, self._timeout = grid, timeout
        config = ConfigRecord({**(train_config or {}), NUM_ROUNDS: num_rounds})
        result = Result()
        if evaluate_fn is not None and (scores := evaluate_fn(0, initial_arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = scores
        arrays = initial_arrays
        for server_round in range(1, num_rounds + 1):
            self._started = time.perf_counter()
            self._sent = list(self.configure_train(server_round, arrays, config, grid))
            replies = grid.send_and_receive(self._sent, timeout=timeout)
            merged, metrics = self.aggregate_train(server_round, replies)
            assert merged is not None
            assert metrics is not None
            assert self.report is not None
            result.arrays = arrays = merged
            result.train_metrics_clientapp[server_round] = metrics
            if observer is not None:
                observer(self.report, self._state)
            if evaluate_fn is not None and (scores := evaluate_fn(server_round, arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = scores
        return result

    # --- clients and their answers -------------------------------------------------------------------------------

    def _answered_rank(self, asked: int, reply: Message) -> int:
        """Return the rank of a reply's factors, where a client sent `asked` may answer with it."""
        record = reply.content.array_records.get(ARRAYS, {})
        found = {array.shape[0] for name, array in record.items() if name.endswith(A_SUFFIX) and array.shape}
        return next((rank for rank in self.accepted_ranks(asked) if found == {rank}), asked)

    def _clients(self, grid: Grid) -> dict[int, str]:
        """Return the client id of each node, asking those that are new."""
        if self.client_ids is None:
            self.client_ids = {}
        nodes = list(grid.get_node_ids())
        asked = [node for node in nodes if node not in self.client_ids]
        if asked:
            messages = [Message(RecordDict(), node, MessageType.QUERY) for node in asked]
            for reply in grid.send_and_receive(messages, timeout=self._timeout):
                if reply.has_content() and CLIENT_ID in reply.content.config_records.get(CONFIG, {}):
                    self.client_ids[reply.metadata.src_node_id] = str(reply.content.config_records[CONFIG][CLIENT_ID])
                else:
                    reason = reply.error.reason if reply.has_error() else "no client id in its answer"
                    raise DeploymentError(
                        f"node {reply.metadata.src_node_id} could not say which client it is: {reason}"
                    )
        known = {node: self.client_ids[node] for node in nodes if node in self.client_ids}
        if len(set(known.values())) < len(known):
            twice = next(client for client in known.values() if list(known.values()).count(client) > 1)
            raise DeploymentError(
                f"two nodes call themselves client '{twice}'; give each its own client-id in --node-config."
            )
        return known

    def _answers(self, replies: Iterable[Message], report: RoundReport) -> Iterator[tuple[str, Message]]:
        """Yield good replies in message order, whatever order they came in, repeating a client that raised once."""
        assert self._grid is not None
        for message, first in in_order(self._sent, replies):
            client = (self.client_ids or {})[message.metadata.dst_node_id]
            self._count_down(message, report)
            reply = first
            if reply is not None and self._needs_arrays(reply):
                message = self._again(message, self._everything(client, message), report)
                reply = self._ask(message)
            raised = False
            if reply is not None and reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
                raised = True
                message = self._again(message, message.content, report)
                reply = self._ask(message)
            if reply is None:
                report.faults.append(Fault(client, "no reply"))
            elif reply.has_error():
                twice = "raised twice: " if raised else "failed: "
                report.faults.append(Fault(client, twice + error_class(reply.error.reason or "no reason given")))
            elif self._needs_arrays(reply):
                report.faults.append(Fault(client, "asks for tensors that it was sent"))
            else:
                sent_names = list(message.content.array_records[ARRAYS])
                deliveries = self._held_by(self._asked[client])
                deliveries.delivered(client, sent_names, self.exchange(self.server_round))
                report.bytes_up += payload_bytes(reply)
                yield client, reply

    def _again(self, message: Message, content: RecordDict, report: RoundReport) -> Message:
        repeated = Message(content, message.metadata.dst_node_id, MessageType.TRAIN, group_id=message.metadata.group_id)
        self._count_down(repeated, report)
        return repeated

    @staticmethod
    def _count_down(message: Message, report: RoundReport) -> None:
        report.bytes_down += payload_bytes(message)
        report.bytes_catch_up += payload_bytes(message, lambda name: BASE_EARLIER in name)

    def _ask(self, message: Message) -> Message | None:
        assert self._grid is not None
        replies = list(self._grid.send_and_receive([message], timeout=self._timeout))
        return replies[0] if replies else None

    def _everything(self, client: str, message: Message) -> RecordDict:
        """Return the content of a message with all that a client can be sent."""
        rank = self._asked[client]
        names = self._held_by(rank).holds_others(client, self.exchange(self.server_round))
        config = message.content.config_records[CONFIG]
        return self._content(rank, names, to_record(self._view(rank).to_tensors()), config)

    @staticmethod
    def _needs_arrays(reply: Message) -> bool:
        answer = reply.content.config_records.get(CONFIG) if reply.has_content() else None
        return answer is not None and bool(answer.get(NEEDS_ARRAYS, False))


def _listed(roles: Collection[Role]) -> list[str]:
    return sorted(str(role) for role in roles)


def _chain(first: ClientUpdate, rest: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
    yield first
    yield from rest
