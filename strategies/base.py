"""A method's contract: what each method says of itself, and how it merges a cohort's updates into the next adapter.

A method holds its options and what it remembers itself; the state of a run's rounds is `.rounds.loop.Loop`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from pydantic import ValidationError
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.config import AdapterConfig, describe
from fedpeft.config.section import Section
from fedpeft.errors import CheckpointError, ConfigError, nearest
from fedpeft.strategies.averaging.private_mean import require_sums
from fedpeft.strategies.capabilities import Capabilities
from fedpeft.strategies.rounds.exchange import Exchange
from fedpeft.strategies.rounds.loop import Evaluate, Loop
from fedpeft.strategies.rounds.ranks import cut
from fedpeft.strategies.rounds.terms import RunTerms
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import NUM_ROUNDS

log = logging.getLogger(__name__)

TERMS = frozenset(each.name for each in fields(RunTerms))


class StrategyOptions(Section):
    """The options of one method, under ``[strategy]`` in a configuration; closed to unknown keys."""


class AdapterStrategy(Strategy):
    """Base of all methods; a Flower strategy whose ``start`` runs a whole federation.

    Parameters
    ----------
    terms : RunTerms, optional
        Of the run: who takes part, and what the adapter is.
    **settings
        Terms by name, such as ``fraction_train=0.5``, ``min_clients=2`` or ``seed=1``, and the method's own options,
        see its ``Options``.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions

    def __init__(self, *, terms: RunTerms | None = None, **settings: Any) -> None:
        named = {key: settings.pop(key) for key in TERMS & settings.keys() - self.Options.model_fields.keys()}
        given = {key: value for key, value in named.items() if value is not None}  # None is a term that is not given
        self.terms = replace(terms or RunTerms(), **given)
        self.options = self.parse_options(settings)
        if self.terms.client_privacy is not None:
            require_sums(type(self), self.options, self.terms.ranks)
        self.seed, self.trains_a = self.terms.seed, self.terms.trains_a
        self.clients = 0  # that there are, as the loop says before each round
        self.loop: Loop | None = None  # of the run that was started last

    # --- what a method defines -----------------------------------------------------------------------------------

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

    @classmethod
    def check_cohort(cls, options: Any, clients: int) -> None:
        """Raise ConfigError if the method cannot merge a cohort of this size; called before anybody trains."""

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Say what the clients of a round train, keep and send; all of it, unless a method says otherwise."""
        return Exchange()

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Merge the cohort's updates, in their order, into the adapter that the next round starts from.

        Parameters
        ----------
        updates : iterable of ClientUpdate
            A stream: a method that needs sums only should not keep them.
        current : AdapterState
            What the round started from.
        server_round : int
            From 1.
        """
        raise TypeError(f"{type(self).__name__} does not define aggregate")

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
        """Return what a client of a rank is told besides, under keys of the method's own."""
        return {}

    def control(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the server's control variate of what clients send up, by name; empty where the method has none.

        Parameters
        ----------
        trained : mapping of str to Tensor
            What clients send up, as the round begins with it.
        """
        return {}

    def control_made_in(self, client: str) -> int:
        """Return the round in which a client made the control variate that it is to go on from; 0 for zero."""
        return 0

    @classmethod
    def step_size(cls, d_in: int, d_out: int, ranks: Sequence[int]) -> int:
        """Return how many numbers of a layer's last change of the base are sent, for clients of these ranks."""
        return 0

    @classmethod
    def needs_singles(cls, options: Any) -> str:
        """Return the option that compares single clients' updates, as ``key = value``, if any: then no sum will do."""
        return ""

    @classmethod
    def needs_start(cls, options: Any) -> str:
        """Return the option that goes by how far clients moved from a common start, as ``key = value``, if any."""
        return ""

    def memory(self) -> dict[str, Tensor]:
        """Return what the method remembers from round to round besides the adapter, for checkpoints."""
        return {}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Take up what `memory` returned: rounds then go on bit by bit as they would have.

        Raises
        ------
        CheckpointError
            There is something that the method does not know of.
        """
        if memory:
            raise CheckpointError(
                f"strategy '{self.name}' has no recall() for what its memory() returned ({', '.join(sorted(memory))}); "
                "the run begins anew, or goes on with the strategy that it began with."
            )

    # --- Flower's strategy ---------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        watchers: Iterable[Watcher] = (),
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
        watchers : iterable of Watcher
            Told how the run goes.

        Raises
        ------
        TooFewClientsError
            A round with fewer good updates than ``min_clients``.
        """
        if evaluate_config:
            raise ConfigError("evaluate_config: clients are not asked to evaluate; pass evaluate_fn instead.")
        self.summary()
        self.loop = Loop(self, grid, initial_arrays, timeout, watchers)
        return self.loop.run(num_rounds, train_config, None if evaluate_fn is None else _without_details(evaluate_fn))

    def summary(self) -> None:
        """Log what the method is and how it was configured."""
        log.info("%s (%s) with %s", self.name, self.capabilities.paper, self.options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask a round's cohort, for who holds the rounds by Flower's protocol instead of ``start``."""
        if NUM_ROUNDS not in config:
            raise ConfigError(
                f"config lacks '{NUM_ROUNDS}', the rounds that there will be: clients' schedules go by it."
            )
        if self.loop is None or server_round == 1:
            self.loop = Loop(self, grid, arrays)
        return self.loop.ask(server_round, arrays, config)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Merge the replies of the cohort that was asked last."""
        if self.loop is None or self.loop.report is None or self.loop.report.server_round != server_round:
            raise ConfigError(f"round {server_round}: configure_train has asked nobody in it; call it first.")
        return self.loop.merge(replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates, on rows of its own."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Report nothing: nobody was asked."""
        return None


def _without_details(evaluate: Callable[[int, ArrayRecord], MetricRecord | None]) -> Evaluate:
    def scores(server_round: int, arrays: ArrayRecord) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        metrics = evaluate(server_round, arrays)
        return None if metrics is None else (dict(metrics), {})

    return scores
