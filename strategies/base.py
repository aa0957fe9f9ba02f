"""What all methods share: options, the capability record, and the one Flower strategy that they extend.

A method says how a cohort's updates become the next adapter (`AdapterStrategy.aggregate`); who is asked, in what order
replies count, which replies are refused and what a round reports is said here once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from pydantic import ValidationError
from torch import Tensor

from fedpeft.adapters.state import A_SUFFIX, AdapterState, ClientUpdate, LoraFactors, Role, role_of
from fedpeft.config import AdapterConfig, cohort_size, describe
from fedpeft.config.section import Section
from fedpeft.errors import ConfigError, TooFewClientsError, nearest
from fedpeft.privacy.client_mechanism import ClientPrivacy
from fedpeft.seeds import generator
from fedpeft.strategies.algebra.factors import round_errors
from fedpeft.strategies.averaging.private_mean import PrivateMean, require_sums
from fedpeft.strategies.capabilities import Capabilities
from fedpeft.strategies.rounds.answers import Answers, known_clients
from fedpeft.strategies.rounds.exchange import Exchange
from fedpeft.strategies.rounds.outgoing import Outgoing, Terms
from fedpeft.strategies.rounds.ranks import Ranks, cut
from fedpeft.strategies.rounds.report import Fault, Observer, RoundReport, client_order, require_enough
from fedpeft.strategies.rounds.updates import RefusedUpdateError, read_update
from fedpeft.wire import (
    ARRAYS,
    NUM_ROUNDS,
    TRAIN_LOSS,
    to_record,
    to_tensors,
)

log = logging.getLogger(__name__)


class StrategyOptions(Section):
    """The options of one method, under ``[strategy]`` in a configuration; closed to unknown keys."""


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
        Ranks of the clients, dealt in turn, where they differ; see `fedpeft.strategies.rounds.ranks`.
    scaling_of : callable, optional
        Scaling of a client of some rank; ``alpha / rank``, with the alpha that `scaling` speaks of, if not given.
    offset : mapping of str to LoraFactors
        By layer, what the initialisation put into the adapter and took out of the base; see
        `fedpeft.adapters.adapted.AdaptedModel`.
    client_privacy : ClientPrivacy, optional
        Clips the clients' updates and adds noise to their sum, see `.averaging.private_mean`; what single
        clients report is then told to nobody, and `min_clients` must only exist, not answer.
    stop_when_spent : bool
        Whether a client whose privacy budget is spent ends the run; else it goes on without it.
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
        offset: Mapping[str, LoraFactors] | None = None,
        client_privacy: ClientPrivacy | None = None,
        stop_when_spent: bool = False,
        **options: Any,
    ) -> None:
        self.fraction_train = fraction_train
        self.min_clients = min_clients
        self.seed = seed
        self.scaling = scaling
        self.frozen_names = frozenset(frozen)
        self.client_ids = None if client_ids is None else dict(client_ids)
        self.measure_error = measure_error
        self.offset = dict(offset or {})
        alpha = scaling * max(ranks, default=1)
        self.ranks = Ranks(ranks, scaling_of or (lambda rank: alpha / rank)) if ranks else None
        self.options = self.parse_options(options)
        self.trains_a = not any(name.endswith(A_SUFFIX) for name in self.frozen_names)
        self.stop_when_spent = stop_when_spent
        self.report: RoundReport | None = None
        self.on_update: Callable[[int, ClientUpdate], None] | None = None  # called as each good update arrives
        self.on_round: Callable[[int], None] | None = None  # called before a cohort is drawn; may raise to end the run
        if client_privacy is not None:
            require_sums(type(self), self.options, ranks)
        self.private_mean = None if client_privacy is None else PrivateMean(client_privacy, seed)
        self.server_round = 0  # of the last round begun
        self._outgoing: Outgoing | None = None
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
        return {} if self.private_mean is None else self.private_mean.memory()

    # --- Flower's strategy ---------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Log what the method is and how it was configured."""
        log.info("%s (%s) with %s", self.name, self.capabilities.paper, self.options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the round's cohort and address one message to each member, in the order of client ids."""
        self.server_round = server_round
        if self.on_round is not None:
            self.on_round(server_round)
        if self.client_ids is None:
            self.client_ids = {}
        nodes = {client: node for node, client in known_clients(grid, self.client_ids, self._timeout).items()}
        everyone = sorted(nodes, key=client_order)
        require_enough(len(everyone), self.min_clients)
        cohort = self._draw(everyone, server_round)
        if self.ranks is not None:
            self.ranks.deal(everyone)
        outgoing = self._require_outgoing()
        outgoing.begin(server_round, arrays, config)
        contents = [outgoing.content(client, self._rank(client)) for client in cohort]
        self.report = RoundReport(server_round, asked=Counter(cohort))  # whoever is interrupted from here on has asked
        return [
            Message(content, nodes[client], MessageType.TRAIN, group_id=str(server_round))
            for client, content in zip(cohort, contents, strict=True)
        ]

    def _draw(self, everyone: Sequence[str], server_round: int) -> list[str]:
        private = self.private_mean
        if private is not None and private.privacy.cohort == "poisson":
            return private.draw(everyone, self.fraction_train, server_round)
        size = cohort_size(len(everyone), self.fraction_train, self.min_clients)
        if private is None:
            self.check_cohort(size)
        else:
            private.expected = size  # the method sees one client, whatever the cohort
        drawn = generator(self.seed, "cohort", server_round).choice(len(everyone), size, replace=False)
        return [everyone[index] for index in sorted(drawn)]

    def _require_outgoing(self) -> Outgoing:
        assert self._outgoing is not None, "start() sets the adapter that the first round begins with"
        return self._outgoing

    def _rank(self, client: str) -> int:
        return 0 if self.ranks is None else self.ranks.of[client]

    def _scaling(self, rank: int) -> float:
        return self.ranks.scaling_of(rank) if rank and self.ranks is not None else self.scaling

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate each reply as it arrives, fold the good ones in, and finish the round."""
        outgoing = self._require_outgoing()
        state = outgoing.view(0)
        if self.report is None or self.report.server_round != server_round:
            self.report = RoundReport(server_round)
        report = self.report
        started = self._started
        kept: list[ClientUpdate] = []
        exchange = self.exchange(server_round)
        assert self._grid is not None
        answers = Answers(self._grid, self._timeout, outgoing, self.client_ids or {}, self.stop_when_spent)
        private = self.private_mean
        # under privacy, what follows from single updates may not be told: the error, who answered, their losses
        measured = self.measure_error and private is None and _has_products(state, exchange)

        def good() -> Iterator[ClientUpdate]:
            for client, reply in answers.good(self._sent, replies, report):
                try:
                    update = self._read(client, reply, outgoing, exchange)
                except RefusedUpdateError as error:
                    report.faults.append(Fault(client, f"update refused: {error}"))
                    continue
                told = update.metrics if private is None else {}
                report.updates.append(ClientUpdate(client, update.num_examples, {}, {}, told))
                if self.on_update is not None and private is None:
                    self.on_update(server_round, report.updates[-1])
                if measured:
                    kept.append(ClientUpdate(client, update.num_examples, update.factors))
                yield update

        stream = good()
        if private is not None:
            names = exchange.sent_up(list(state.adapter_tensors()), self.frozen_names)
            stream = iter([private.as_one_client(stream, state, names, server_round)])
        first = next(stream, None)
        if first is not None:
            merged = self.aggregate(_chain(first, stream), state)
        report.seconds = time.perf_counter() - started
        too_few = private is None and len(report.updates) < self.min_clients  # under privacy, no answer counts as zero
        if too_few or first is None:
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
            errors = round_errors(kept, state, merged, self.offset)
            report.aggregation_error, report.aggregation_error_of_total = errors.of_step, errors.of_total
        report.seconds = time.perf_counter() - started
        outgoing.update(merged)
        metrics = MetricRecord({} if report.train_loss is None else {TRAIN_LOSS: report.train_loss})
        return to_record(tensors), metrics

    def _read(self, client: str, reply: Message, outgoing: Outgoing, exchange: Exchange) -> ClientUpdate:
        """Read a reply, of the rank that the client was sent or of one that it may have come to."""
        asked = outgoing.asked(client)
        view, rank = outgoing.view(asked), self._answered_rank(asked, reply)
        held = (view if rank == asked else cut(view, rank, self._scaling(asked))).adapter_tensors()
        expected = {name: held.pop(name) for name in exchange.sent_up(list(held), self.frozen_names)}
        update = read_update(reply, client, expected, held, self._scaling(asked))
        if self.ranks is not None:
            self.ranks.of[client] = rank
        return update

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
        terms = Terms(self.exchange, self.view, self._scaling, self.client_settings, self.frozen_names)
        self._outgoing = Outgoing(AdapterState.from_tensors(tensors, self.scaling), terms)
        self._grid, self._timeout = grid, timeout
        config = ConfigRecord({**(train_config or {}), NUM_ROUNDS: num_rounds})
        result = Result()
        if evaluate_fn is not None and (scores := evaluate_fn(0, initial_arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = scores
        arrays = initial_arrays
        for server_round in range(1, num_rounds + 1):
            self._started = time.perf_counter()
            self._sent = list(self.configure_train(server_round, arrays, config, grid))
            replies = grid.send_and_receive(self._sent, timeout=timeout) if self._sent else []
            merged, metrics = self.aggregate_train(server_round, replies)
            assert merged is not None
            assert metrics is not None
            assert self.report is not None
            result.arrays = arrays = merged
            result.train_metrics_clientapp[server_round] = metrics
            if observer is not None:
                observer(self.report, self._outgoing.view(0))
            if evaluate_fn is not None and (scores := evaluate_fn(server_round, arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = scores
        return result

    def _answered_rank(self, asked: int, reply: Message) -> int:
        """Return the rank of a reply's factors, where a client sent `asked` may answer with it."""
        arrays = reply.content.array_records.get(ARRAYS) or ArrayRecord()
        found = {array.shape[0] for name, array in arrays.items() if name.endswith(A_SUFFIX) and array.shape}
        return next((rank for rank in self.accepted_ranks(asked) if found == {rank}), asked)


def _has_products(state: AdapterState, exchange: Exchange) -> bool:
    """Tell whether the clients' updates are products of factors that the server comes to know."""
    others = any(role_of(name) is Role.PARAMETER for name in state.dense)
    return bool(state.factors) and not others and not exchange.personal & {Role.A, Role.B, Role.R}


def _chain(first: ClientUpdate, rest: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
    yield first
    yield from rest
