"""Who is told what of a run, and in which order; and rounds that Flower's own protocol holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedpeft.adapters.state import AdapterState, ClientUpdate, fingerprint
from fedpeft.errors import ConfigError, TooFewClientsError
from fedpeft.privacy.client_mechanism import ClientPrivacy
from fedpeft.strategies import FedIt, Local, LoraFair, StrategyOptions
from fedpeft.strategies.rounds.report import RoundReport
from fedpeft.strategies.rounds.terms import RunTerms
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import CONFIG_RECORD, NUM_ROUNDS, ROUND, to_record, to_tensors
from tests.strategies.test_base import A, Client, FunctionGrid, adding, ids, initial, raising


class Diary(Watcher):
    """Writes down all that it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def round_begins(self, server_round: int) -> None:
        self.lines.append(("begins", server_round))

    def update_arrived(self, server_round: int, update: ClientUpdate) -> None:
        assert not update.factors
        assert not update.dense
        self.lines.append(("update", server_round, update.client_id))

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        self.lines.append(("done", report.server_round, float(state.to_tensors()[A].sum())))

    def round_broken(self, report: RoundReport, error: BaseException) -> None:
        self.lines.append(("broken", report.server_round, type(error)))

    def scored(self, server_round: int, metrics: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        self.lines.append(("scored", server_round, dict(metrics)))

    def ended(self, error: BaseException | None) -> None:
        self.lines.append(("ended", None if error is None else type(error)))


def clients(count: int = 4) -> dict[int, Client]:
    return {node: adding(0.5 * node, node) for node in range(1, count + 1)}


def test_watchers_hear_of_each_step_as_it_happens() -> None:
    diary = Diary()
    final = FedIt(client_ids=ids(2)).start(
        grid=FunctionGrid(clients(2)),
        initial_arrays=to_record(initial()),
        num_rounds=1,
        evaluate_fn=lambda server_round, arrays: MetricRecord({"size": len(arrays)}),
        watchers=[diary],
    )
    assert diary.lines == [
        ("scored", 0, {"size": 3}),
        ("begins", 1),
        ("update", 1, "0"),
        ("update", 1, "1"),
        ("done", 1, float(to_tensors(final.arrays)[A].sum())),
        ("scored", 1, {"size": 3}),
        ("ended", None),
    ]
    assert final.evaluate_metrics_serverapp[1] == MetricRecord({"size": 3})


def test_watchers_hear_of_a_round_that_fails_and_of_the_end() -> None:
    diary = Diary()
    with pytest.raises(TooFewClientsError):
        FedIt(client_ids=ids(1)).start(FunctionGrid({1: raising}), to_record(initial()), 2, watchers=[diary])
    assert diary.lines == [("begins", 1), ("broken", 1, TooFewClientsError), ("ended", TooFewClientsError)]


def test_a_round_in_which_nobody_was_asked_is_not_a_broken_one() -> None:
    diary = Diary()
    with pytest.raises(ConfigError):
        FedIt(client_ids=ids(1), min_clients=2).start(FunctionGrid(clients(1)), to_record(initial()), watchers=[diary])
    assert diary.lines == [("begins", 1), ("ended", ConfigError)]


def test_flower_users_start_a_method_with_a_few_words() -> None:
    grid, told = FunctionGrid(clients()), []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        told.append(server_round)
        return None

    strategy = LoraFair(fraction_train=0.5, min_clients=2, seed=1, solver="cosine", client_ids=ids(4))
    result = strategy.start(
        grid=grid,
        initial_arrays=to_record(initial()),
        num_rounds=3,
        timeout=7.0,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_fn=evaluate,
    )
    assert told == [0, 1, 2, 3]
    assert result.evaluate_metrics_serverapp == {}
    settings = [message.content.config_records[CONFIG_RECORD] for message in grid.log]
    assert [(each["lr"], each[NUM_ROUNDS], each[ROUND]) for each in settings] == [
        (0.1, 3, number) for number in (1, 1, 2, 2, 3, 3)
    ]


def test_rounds_that_flowers_protocol_holds_are_those_of_start() -> None:
    started = FedIt(client_ids=ids(4), fraction_train=0.5).start(FunctionGrid(clients()), to_record(initial()), 3)
    strategy, grid = FedIt(client_ids=ids(4), fraction_train=0.5), FunctionGrid(clients())
    assert isinstance(strategy, Strategy)
    with pytest.raises(ConfigError, match="configure_train has asked nobody"):
        strategy.aggregate_train(1, [])
    arrays = to_record(initial())
    for server_round in (1, 2, 3):
        messages = list(strategy.configure_train(server_round, arrays, ConfigRecord({NUM_ROUNDS: 3}), grid))
        arrays, metrics = strategy.aggregate_train(server_round, grid.send_and_receive(messages))
        assert metrics == started.train_metrics_clientapp[server_round]
    assert fingerprint(to_tensors(arrays)) == fingerprint(to_tensors(started.arrays))


def test_who_holds_the_rounds_must_say_how_many_there_will_be() -> None:
    with pytest.raises(ConfigError, match="config lacks 'num-rounds'"):
        FedIt(client_ids=ids(4)).configure_train(1, to_record(initial()), ConfigRecord(), FunctionGrid(clients()))


def test_a_second_run_of_a_method_begins_a_loop_of_its_own() -> None:
    strategy = FedIt(client_ids=ids(2))
    one, two = (strategy.start(FunctionGrid(clients(2)), to_record(initial()), 2) for _ in range(2))
    assert fingerprint(to_tensors(one.arrays)) == fingerprint(to_tensors(two.arrays))


def test_a_term_that_is_none_is_one_that_is_not_given() -> None:
    method = FedIt(client_ids=None, offset=None, scaling_of=None, client_privacy=None, min_clients=2)
    assert method.terms == RunTerms(min_clients=2)
    client = RunTerms(client_privacy=ClientPrivacy(1.0))
    assert FedIt(terms=client, client_privacy=None).terms == client


def test_an_option_of_the_methods_own_is_not_taken_for_a_term_of_the_run() -> None:
    class Seeded(Local):
        class Options(StrategyOptions):
            seed: int = 0

    method = Seeded(terms=RunTerms(seed=3), min_clients=2, seed=5)
    assert (method.terms.seed, method.options.seed) == (3, 5)
    assert (method.terms.min_clients, method.terms.fraction_train) == (2, 1.0)


def test_what_a_client_of_a_rank_multiplies_with_keeps_alpha() -> None:
    terms = RunTerms(scaling=2.0, ranks=(2, 4))
    assert [terms.scaling_at(rank) for rank in (0, 2, 4)] == [2.0, 4.0, 2.0]
    assert RunTerms(scaling=2.0).scaling_at(7) == 2.0
    assert RunTerms(scaling=9.0, ranks=(2,), scaling_of=float).scaling_at(2) == 2.0


def test_what_a_watcher_raises_ends_the_run() -> None:
    class Tired(Watcher):
        def round_done(self, report: RoundReport, state: AdapterState) -> None:
            if report.server_round == 2:
                raise KeyboardInterrupt

    grid, seen = FunctionGrid(clients(1)), Diary()
    with pytest.raises(KeyboardInterrupt):
        FedIt(client_ids=ids(1)).start(grid, to_record(initial()), 5, watchers=[seen, Tired()])
    assert len(grid.log) == 2
    assert seen.lines[-2:] == [("broken", 2, KeyboardInterrupt), ("ended", KeyboardInterrupt)]
