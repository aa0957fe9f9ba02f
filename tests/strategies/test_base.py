"""The loop that all methods share, under a grid whose clients are plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from flwr.app import Array, Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedpeft.adapters.state import AdapterState, TrainMetrics, fingerprint
from fedpeft.errors import ConfigError, DeploymentError, TooFewClientsError
from fedpeft.strategies import FedIt, find
from fedpeft.strategies.rounds.report import RoundReport, client_order, error_class, in_order
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import ARRAYS_RECORD, Identity, ShortAnswer, TrainAnswer, TrainOrder, to_record, to_tensors

A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "head.weight"
Client = Callable[[Message], Message]


class FunctionGrid(Grid):
    """Delivers messages to functions, and replies in whatever order it is told to."""

    def __init__(self, clients: dict[int, Client], reverse: bool = False) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
        self.clients, self.reverse, self.sent = clients, reverse, 0
        self.log: list[Message] = []

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):  # type: ignore[no-untyped-def]
        return Message(content, dst_node_id, message_type)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            self.sent += 1
            message.metadata.__dict__["_message_id"] = f"m{self.sent}"
            self.log.append(message)
            replies.append(self.clients[message.metadata.dst_node_id](message))
        return replies[::-1] if self.reverse else replies


def initial() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        A: torch.randn(2, 5, generator=draw),
        B: torch.zeros(3, 2),
        HEAD: torch.randn(2, 3, generator=draw),
    }


def reply_with(message: Message, tensors: dict[str, Tensor], examples: object = 1, loss: float = 0.5) -> Message:
    answer = TrainAnswer(to_record(tensors), examples, TrainMetrics(loss=loss))  # type: ignore[arg-type]
    return Message(answer.to_record(), reply_to=message)


def adding(amount: float, examples: int = 1) -> Client:
    """Make a client that adds a number to every tensor it is sent."""

    def client(message: Message) -> Message:
        sent = to_tensors(TrainOrder.from_record(message.content).arrays)
        return reply_with(message, {name: tensor + amount for name, tensor in sent.items()}, examples, amount)

    return client


def raising(message: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError"), reply_to=message)


def ids(count: int) -> dict[int, str]:
    return {node: str(node - 1) for node in range(1, count + 1)}


class Reports(Watcher):
    """Collects the reports of rounds."""

    def __init__(self, reports: list[RoundReport]) -> None:
        self.reports = reports

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        self.reports.append(report)


def run(
    clients: dict[int, Client], rounds: int = 1, reverse: bool = False, **options: object
) -> tuple[dict[str, Tensor], list[RoundReport], FunctionGrid]:
    grid = FunctionGrid(clients, reverse)
    reports: list[RoundReport] = []
    options.setdefault("client_ids", ids(len(clients)))
    strategy = FedIt(**options)  # type: ignore[arg-type]
    result = strategy.start(grid, to_record(initial()), rounds, watchers=[Reports(reports)])
    return to_tensors(result.arrays), reports, grid


def test_a_round_is_the_weighted_mean_of_the_replies() -> None:
    final, reports, _ = run({1: adding(1.0, 3), 2: adding(5.0, 1)})
    for name, tensor in initial().items():
        torch.testing.assert_close(final[name], tensor + 2.0)
    assert reports[0].train_loss == pytest.approx(2.0)
    assert [update.client_id for update in reports[0].updates] == ["0", "1"]


def test_bytes_are_those_of_the_values_that_travelled() -> None:
    _, reports, _ = run({1: adding(1.0), 2: adding(5.0)})
    values = 4 * (2 * 5 + 3 * 2 + 2 * 3)
    assert (reports[0].bytes_up, reports[0].bytes_down) == (2 * values, 2 * values)


def test_the_order_of_arrival_does_not_change_a_byte() -> None:
    clients = {node: adding(0.1 * node, node) for node in range(1, 8)}
    assert fingerprint(run(clients, 3)[0]) == fingerprint(run(clients, 3, reverse=True)[0])


def test_node_ids_do_not_matter_but_client_ids_do() -> None:
    clients = {node: adding(0.1 * node, node) for node in range(1, 8)}
    straight, _, _ = run(clients, 3, fraction_train=0.5)
    names = {100 - node: str(node - 1) for node in clients}
    turned, _, _ = run(
        {100 - node: client for node, client in clients.items()}, 3, fraction_train=0.5, client_ids=names
    )
    assert fingerprint(straight) == fingerprint(turned)


def test_each_round_draws_its_own_cohort_from_the_seed_alone() -> None:
    clients = {node: adding(0.0) for node in range(1, 21)}
    cohorts = [[u.client_id for u in report.updates] for report in run(clients, 6, fraction_train=0.25)[1]]
    assert all(len(set(cohort)) == 5 for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert cohorts == [[u.client_id for u in r.updates] for r in run(clients, 6, fraction_train=0.25)[1]]
    assert cohorts != [[u.client_id for u in r.updates] for r in run(clients, 6, fraction_train=0.25, seed=1)[1]]


def broken(kind: str) -> Client:
    def client(message: Message) -> Message:
        tensors = to_tensors(TrainOrder.from_record(message.content).arrays)
        examples: object = 4
        if kind == "nan":
            tensors[B] = torch.full_like(tensors[B], float("nan"))
        elif kind == "infinity":
            tensors[A] = torch.full_like(tensors[A], float("inf"))
        elif kind == "shape":
            tensors[A] = tensors[A].T.contiguous()
        elif kind == "type":
            tensors[A] = tensors[A].double()
        elif kind == "missing":
            del tensors[HEAD]
        elif kind == "unknown":
            tensors["extra"] = torch.ones(1)
        elif kind == "count":
            examples = 0
        elif kind == "fraction of a row":
            examples = 1.5
        return reply_with(message, tensors, examples)

    return client


@pytest.mark.parametrize(
    "kind", ["nan", "infinity", "shape", "type", "missing", "unknown", "count", "fraction of a row"]
)
def test_a_bad_update_is_refused_by_name_and_never_averaged(kind: str) -> None:
    final, reports, _ = run({1: adding(1.0, 3), 2: broken(kind), 3: adding(5.0, 1)})
    torch.testing.assert_close(final[A], initial()[A] + 2.0)
    (fault,) = reports[0].faults
    assert fault.client_id == "1"
    assert "refused" in fault.reason


def test_a_client_that_raises_once_is_asked_again_and_counts() -> None:
    calls = []

    def flaky(message: Message) -> Message:
        calls.append(message)
        return raising(message) if len(calls) == 1 else adding(5.0)(message)

    steady, _, _ = run({1: adding(1.0), 2: adding(5.0), 3: adding(7.0)})
    final, reports, _ = run({1: adding(1.0), 2: flaky, 3: adding(7.0)})
    assert fingerprint(final) == fingerprint(steady)
    assert reports[0].faults == []
    assert len(calls) == 2


def test_a_client_that_raises_twice_is_reported_and_the_round_goes_on() -> None:
    final, reports, _ = run({1: adding(1.0), 2: raising, 3: adding(3.0)}, min_clients=2)
    torch.testing.assert_close(final[A], initial()[A] + 2.0)
    assert [(fault.client_id, fault.reason) for fault in reports[0].faults] == [("1", "raised twice: ValueError")]


def test_a_client_that_cannot_be_reached_is_not_asked_again() -> None:
    def unreachable(message: Message) -> Message:
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)

    _, reports, grid = run({1: adding(1.0), 2: unreachable})
    assert [(fault.client_id, fault.reason) for fault in reports[0].faults] == [("1", "failed: gone")]
    assert len(grid.log) == 2


def test_too_few_good_updates_stop_the_run_by_name() -> None:
    with pytest.raises(TooFewClientsError, match=r"round 1: 1 good updates.*client 1: raised twice"):
        run({1: adding(1.0), 2: raising}, min_clients=2)


def test_more_clients_needed_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"min_clients = 3.*2 clients"):
        run({1: adding(1.0), 2: adding(1.0)}, min_clients=3)


def with_own_frozen(a: Tensor) -> Client:
    """Make an FFA client that draws its own A, and says so if the server expects another one."""

    def client(message: Message) -> Message:
        order = TrainOrder.from_record(message.content)
        sent = to_tensors(order.arrays)
        held = {A: a} if A not in sent else {}
        if (fingerprint(held) if held else "") != order.held_hash:
            return Message(ShortAnswer.NEEDS_ARRAYS.to_record(), reply_to=message)
        trained = {name: tensor + 1.0 for name, tensor in sent.items() if name != A}
        return reply_with(message, trained)

    return client


def test_frozen_tensors_travel_as_a_hash_and_only_to_those_who_draw_others() -> None:
    agreeing, other = with_own_frozen(initial()[A]), with_own_frozen(torch.ones(2, 5))
    final, reports, grid = run({1: agreeing, 2: other, 3: agreeing}, 2, frozen=[A])
    assert torch.equal(final[A], initial()[A])
    torch.testing.assert_close(final[B], initial()[B] + 2.0)
    assert [len(report.updates) for report in reports] == [3, 3]
    carried = [m.metadata.dst_node_id for m in grid.log if A in TrainOrder.from_record(m.content).arrays]
    assert carried == [2, 2]  # repeated at once in round 1, sent along in round 2
    values = 4 * (3 * 2 + 2 * 3)
    assert reports[1].bytes_up == 3 * values
    assert reports[1].bytes_down == 3 * values + 4 * 2 * 5


def named(name: str, then: Client) -> Client:
    def client(message: Message) -> Message:
        if message.metadata.message_type == "query":
            return Message(Identity(name).to_record(), reply_to=message)
        return then(message)

    return client


def test_nodes_are_asked_once_for_their_client_id() -> None:
    _, reports, grid = run({7: named("b", adding(1.0)), 9: named("a", adding(1.0))}, 2, client_ids={})
    assert [[u.client_id for u in report.updates] for report in reports] == [["a", "b"], ["a", "b"]]
    assert sum(message.metadata.message_type == "query" for message in grid.log) == 2


def test_two_nodes_of_one_name_are_an_error() -> None:
    with pytest.raises(DeploymentError, match="two nodes call themselves client 'a'"):
        run({7: named("a", adding(1.0)), 9: named("a", adding(1.0))}, client_ids={})


def test_a_supernodes_wrapping_of_an_error_is_taken_off() -> None:
    assert error_class("<class 'fedpeft.clients.app.ClientFailedError'>:<'ValueError'>") == "ValueError"
    assert error_class("WorkerDied") == "WorkerDied"
    told = "SitePolicyError: this site names no ledger, and trains with one only: 'privacy-ledger=\"/path\"'."
    assert error_class(f"<class 'fedpeft.clients.app.ClientFailedError'>:<'{told}'>") == told


def test_client_ids_are_ordered_as_numbers_before_names() -> None:
    assert sorted(["10", "b", "9", "a"], key=client_order) == ["9", "10", "a", "b"]


def test_messages_without_a_reply_are_faults() -> None:
    class Losing(FunctionGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return list(super().send_and_receive(messages))[1:]

    reports: list[RoundReport] = []
    grid = Losing({1: adding(1.0), 2: adding(1.0)})
    FedIt(client_ids=ids(2)).start(grid, to_record(initial()), 1, watchers=[Reports(reports)])
    assert [(fault.client_id, fault.reason) for fault in reports[0].faults] == [("0", "no reply")]


def test_a_stream_is_not_read_ahead_of_the_message_it_is_for() -> None:
    grid = FunctionGrid({1: adding(1.0), 2: adding(1.0)})
    order = TrainOrder(to_record(initial()), server_round=1, num_rounds=1, scaling=1.0)
    messages = [Message(order.to_record(), node, "train") for node in (1, 2)]
    read: list[int] = []

    def stream() -> Iterable[Message]:
        for reply in grid.send_and_receive(messages):
            read.append(reply.metadata.src_node_id)
            yield reply

    pairs = in_order(messages, stream())
    next(pairs)
    assert read == [1]


def test_unknown_strategies_and_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'lora-fair'"):
        find("lora-fare")
    with pytest.raises(
        ConfigError, match=r"strategy 'lora-fair' has no option 'regularisation'\. Did you mean 'regularization'"
    ):
        find("lora-fair").parse_options({"regularisation": 1})
    with pytest.raises(ConfigError, match=r"strategy.solver = 'magic'"):
        find("lora-fair").parse_options({"solver": "magic"})


def test_a_merged_adapter_that_overflows_ends_the_run() -> None:
    class Overflowing(FedIt):
        def aggregate(self, updates, current, server_round=1):  # type: ignore[no-untyped-def]
            merged = super().aggregate(updates, current, server_round)
            return AdapterState(merged.factors, {HEAD: torch.full((2, 3), float("inf"))})

    with pytest.raises(TooFewClientsError, match=r"merged adapter holds NaN or infinity in head.weight"):
        Overflowing(client_ids=ids(1)).start(FunctionGrid({1: adding(1.0)}), to_record(initial()), 1)


@pytest.mark.parametrize("data", [b"PK\x03\x04not a zip", b"\x93NUMPY\x01\x00v\x00{", b""])
def test_bytes_that_are_no_array_cost_their_client_alone(data: bytes) -> None:
    def hostile(message: Message) -> Message:
        reply = reply_with(message, to_tensors(TrainOrder.from_record(message.content).arrays))
        record = reply.content.array_records[ARRAYS_RECORD]
        record[A] = Array("bogus", record[A].shape, "numpy.ndarray", data)
        return reply

    strategy = FedIt(client_ids=ids(2))
    strategy.start(FunctionGrid({1: adding(1.0), 2: hostile}), to_record(initial()), 1)
    assert strategy.loop is not None
    assert strategy.loop.report is not None
    assert [fault.client_id for fault in strategy.loop.report.faults] == [strategy.loop.client_ids[2]]
