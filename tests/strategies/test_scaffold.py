"""SCAFFOLD against its paper's algorithm, written down densely in float64 over quadratic clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.adapters.state import TrainMetrics
from fedpeft.clients.control import Control
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, MessageError
from fedpeft.rescoring import rescore
from fedpeft.resident import resident
from fedpeft.runs import read_events
from fedpeft.runs.checkpoints import read_checkpoint
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import resume, simulate
from fedpeft.strategies import FedIt, with_typed_options
from fedpeft.strategies.scaffold import Scaffold
from fedpeft.training.local import Turn, train_locally
from fedpeft.training.steps import Additions
from fedpeft.wire import TrainAnswer, TrainOrder, to_record, to_tensors
from tests.strategies.test_base import HEAD, A, B, FunctionGrid, ids

Make = Callable[..., RunConfig]
LR, STEPS = 0.1, 3


def begin() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {A: (2, 5), B: (3, 2), HEAD: (2, 3)}
    return {name: torch.randn(*shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


class Quadratic:
    """A client that pulls every tensor towards a target of its own, and follows orders as the client app does."""

    def __init__(self, client: int, rows: int) -> None:
        draw = torch.Generator().manual_seed(100 + client)
        self.rows, self.state = rows, RecordDict()
        self.target = {n: torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in begin().items()}
        self.curvature = 0.5 + client

    def gradient(self, name: str, at: Tensor) -> Tensor:
        return self.curvature * (at - self.target[name])

    def __call__(self, message: Message) -> Message:
        order = TrainOrder.from_record(message.content)
        start = to_tensors(order.arrays)
        control = Control.of(order, start, self.state)
        self.lost = control is not None and control.is_lost
        rates = [LR / (1 + step) for step in range(STEPS)]  # a schedule
        trained = {}
        correction = dict.fromkeys(start, torch.zeros(())) if control is None else control.correction()
        for name, tensor in start.items():
            for rate in rates:
                tensor = tensor - rate * (self.gradient(name, tensor) + correction[name])
            trained[name] = tensor
        if control is not None:
            control.keep(start, trained, sum(rates), self.state)
        answer = TrainAnswer(to_record(trained), self.rows, TrainMetrics(rate_sum=sum(rates), control_lost=self.lost))
        return Message(answer.to_record(), reply_to=message)


def dense(rows: list[int], cohorts: list[list[int]], rate: float, weigh: bool) -> tuple[dict[str, Tensor], ...]:
    """Run Algorithm 1 with option II; clients weigh by rows if asked, which all must be known by."""
    clients = [Quadratic(number, count) for number, count in enumerate(rows)]
    weights = [float(count) if weigh else 1.0 for count in rows]
    x, zero = begin(), {n: torch.zeros_like(t) for n, t in begin().items()}
    c, own = dict(zero), [dict(zero) for _ in clients]
    rates = [LR / (1 + step) for step in range(STEPS)]
    for cohort in cohorts:
        moved = {n: torch.zeros_like(t) for n, t in x.items()}
        before = dict(c)
        for i in cohort:
            for name in x:
                y = x[name]
                for lr in rates:
                    y = y - lr * (clients[i].gradient(name, y) + before[name] - own[i][name])
                new = own[i][name] - before[name] + (x[name] - y) / sum(rates)
                moved[name] += weights[i] / sum(weights[j] for j in cohort) * (y - x[name])
                c[name] = c[name] + weights[i] / sum(weights) * (new - own[i][name])
                own[i][name] = new
        x = {name: t + rate * moved[name] for name, t in x.items()}
    return x, c


@pytest.mark.parametrize("rate", [1.0, 0.7])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rounds_are_those_of_the_papers_algorithm(rate: float, fraction: float) -> None:
    clients = {node: Quadratic(node - 1, 3) for node in range(1, 5)}
    strategy = Scaffold(
        client_ids=ids(4), fraction_train=fraction, scaling=2.0, seed=4, server_learning_rate=rate, measure_error=False
    )
    grid = FunctionGrid({**clients})
    result = strategy.start(grid, to_record(begin()), 6)
    cohorts: list[list[int]] = [[] for _ in range(6)]
    for message in grid.log:
        cohorts[int(message.metadata.group_id) - 1].append(message.metadata.dst_node_id - 1)
    assert len({tuple(cohort) for cohort in cohorts}) == (1 if fraction == 1 else len({*map(tuple, cohorts)}))
    x, c = dense([3] * 4, cohorts, rate, weigh=False)
    got = to_tensors(result.arrays)
    for name, tensor in strategy.control(got).items():
        torch.testing.assert_close(got[name], x[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(tensor, c[name], rtol=1e-10, atol=1e-10)


def test_clients_of_unequal_rows_settle_where_the_loss_over_all_rows_is_least() -> None:
    rows = [1, 7, 2]
    strategy = Scaffold(client_ids=ids(3), scaling=2.0, measure_error=False)
    clients = {node: Quadratic(node - 1, rows[node - 1]) for node in range(1, 4)}
    got = to_tensors(strategy.start(FunctionGrid({**clients}), to_record(begin()), 300).arrays)
    plain = {node: Quadratic(node - 1, rows[node - 1]) for node in range(1, 4)}
    drifted = to_tensors(
        FedIt(client_ids=ids(3), scaling=2.0, measure_error=False)
        .start(FunctionGrid({**plain}), to_record(begin()), 300)
        .arrays
    )
    for name, tensor in got.items():
        weights = [count * clients[node].curvature for node, count in enumerate(rows, 1)]
        best = sum(w * clients[node].target[name] for node, w in enumerate(weights, 1)) / sum(weights)
        torch.testing.assert_close(tensor, best, rtol=1e-8, atol=1e-8)
        assert (drifted[name] - best).norm() > 1e-2  # FedAvg settles elsewhere


class Restarted(Quadratic):
    """A client that loses all that it keeps, once."""

    def __init__(self, client: int, rows: int, after: int) -> None:
        super().__init__(client, rows)
        self.after = after

    def __call__(self, message: Message) -> Message:
        if message.metadata.group_id == str(self.after):
            self.state = RecordDict()
        return super().__call__(message)


class Unheard(Quadratic):
    """A client that trains in each of some rounds, and whose answers of these rounds the server refuses."""

    def __init__(self, client: int, rows: int, rounds: range) -> None:
        super().__init__(client, rows)
        self.rounds = rounds

    def __call__(self, message: Message) -> Message:
        reply = super().__call__(message)
        if int(message.metadata.group_id) in self.rounds:
            reply.content["arrays"] = to_record({A: torch.zeros(1)})
        return reply


@pytest.mark.parametrize("kind", ["restarted", "unheard"])
def test_a_client_that_lost_its_variate_or_was_not_heard_moves_no_fixed_point(kind: str) -> None:
    """With one that the server counts and no client holds, c would be off for ever, and the rounds end elsewhere."""
    clients = {node: Quadratic(node - 1, 3) for node in range(1, 4)}
    clients[2] = Restarted(1, 3, 5) if kind == "restarted" else Unheard(1, 3, range(4, 9))
    strategy = Scaffold(client_ids=ids(3), scaling=2.0, measure_error=False, min_clients=2)
    got = to_tensors(strategy.start(FunctionGrid({**clients}), to_record(begin()), 300).arrays)
    for name, tensor in got.items():
        best = sum(each.curvature * each.target[name] for each in clients.values()) / sum(
            each.curvature for each in clients.values()
        )
        torch.testing.assert_close(tensor, best, rtol=1e-8, atol=1e-8)
    if kind == "unheard":
        assert not any(each.lost for each in clients.values())
        own = [to_tensors(each.state.array_records["control"]) for each in clients.values()]
        for name, tensor in strategy.control(got).items():
            torch.testing.assert_close(tensor, sum(each[name] for each in own) / 3)


def test_rows_that_a_client_has_more_of_from_some_round_on_begin_the_variates_anew() -> None:
    clients = {node: Quadratic(node - 1, 3) for node in range(1, 4)}
    strategy = Scaffold(client_ids=ids(3), scaling=2.0, measure_error=False)
    strategy.start(FunctionGrid({**clients}), to_record(begin()), 1)
    assert strategy.control_made_in("2") == 1
    clients[1].rows = 4
    strategy.start(FunctionGrid({**clients}), to_record(begin()), 1)
    assert strategy.control_made_in("2") == 0


def test_while_all_control_variates_are_zero_a_round_is_fedits() -> None:
    one = Scaffold(client_ids=ids(3)).start(FunctionGrid({n: Quadratic(n, n) for n in ids(3)}), to_record(begin()), 1)
    two = FedIt(client_ids=ids(3)).start(FunctionGrid({n: Quadratic(n, n) for n in ids(3)}), to_record(begin()), 1)
    assert all(torch.equal(t, to_tensors(two.arrays)[n]) for n, t in to_tensors(one.arrays).items())


def test_a_control_variate_that_does_not_fit_is_refused_by_name() -> None:
    order = TrainOrder(to_record({}), 1, 1, 1.0, control=to_record({"a": torch.zeros(1)}))
    with pytest.raises(MessageError, match="'control' of the order does not fit what is trained: b"):
        Control.of(order, {"a": torch.zeros(1), "b": torch.zeros(1)}, RecordDict())


def test_a_correction_is_added_to_every_step_after_clipping(text_config: Make) -> None:
    config = text_config(
        train__optimizer="sgd", train__learning_rate=0.5, train__max_grad_norm=1e-9, train__local_steps=4
    )
    home = resident(config)
    names = home.adapted.trained
    correction = {name: torch.full_like(home.adapted.initial[name], 0.25) for name in names}
    home.adapted.load(home.adapted.initial, home.adapted.scaling)
    rows = home.partition.indices[0]
    turn, additions = Turn(0, "0", 1, 2), Additions(correction=correction)
    result = train_locally(home.adapted, home.data.train, rows, config.train, turn, additions=additions)
    assert result.rate_sum == pytest.approx(2.0)
    after: Mapping[str, Tensor] = home.adapted.tensors(names)
    for name in names:
        torch.testing.assert_close(after[name], home.adapted.initial[name] - 0.5, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"train__optimizer": "adamw"},
            "train.optimizer = 'adamw' .*: strategy 'scaffold' needs steps .*Use sgd without",
        ),
        (
            {"train__optimizer": "sgd", "train__momentum": 0.9},
            r"'sgd' \(momentum 0.9, .*strategy 'scaffold' needs steps",
        ),
    ],
)
def test_optimisers_whose_steps_are_not_gradients_are_refused(
    settings: dict[str, Any], says: str, text_config: Make
) -> None:
    with pytest.raises(ConfigError, match=says):
        with_typed_options(text_config(strategy__name="scaffold", **settings))


def test_a_run_that_names_no_optimiser_has_plain_gradient_descent(text_config: Make) -> None:
    config = with_typed_options(text_config(strategy__name="scaffold"))
    assert config.train.optimizer == "sgd"


def test_a_simulated_run_keeps_variates_with_its_clients_and_goes_on_to_the_same_bytes(
    text_config: Make, tmp_path: Path
) -> None:
    settings = {"strategy__name": "scaffold", "train__learning_rate": 0.5, "federation__fraction": 0.67}
    whole = simulate(text_config(federation__rounds=4, **settings), tmp_path / "whole").path
    begun = simulate(text_config(federation__rounds=2, **settings), tmp_path / "begun").path
    resume(begun, {"federation": {"rounds": 4}})
    name = "adapter/adapter_model.safetensors"
    assert (begun / name).read_bytes() == (whole / name).read_bytes()
    assert rescore(whole, {})["loss"] == pytest.approx(
        [event for event in read_events(whole) if event["event"] == "evaluate"][-1]["loss"], rel=1e-5
    )
    checkpoint = read_checkpoint(whole, 4)
    heard = json.loads(bytes(checkpoint.tensors["method:heard"].tolist()))
    kept = checkpoint.facts["clients"]
    own = {client: load_file(whole / "clients" / client / "state" / f"{kept[client]}.safetensors") for client in heard}
    assert kept.keys() == heard.keys()
    totals = {
        n.removeprefix("method:total."): t for n, t in checkpoint.tensors.items() if n.startswith("method:total.")
    }
    assert max(float(total.norm()) for total in totals.values()) > 1e-3
    for name, total in totals.items():
        of_clients = [heard[client] * own[client][json.dumps(["control", name])].double() for client in heard]
        torch.testing.assert_close(total, torch.stack(of_clients).sum(0), rtol=1e-4, atol=1e-5)
    planned = plan(text_config(federation__rounds=4, **settings))
    rounds = [event for event in read_events(whole) if event["event"] == "round"]
    assert sum(event["bytes_up"] + event["bytes_down"] for event in rounds) == planned.total_bytes
    assert rounds[0]["bytes_down"] == 2 * rounds[0]["bytes_up"]


def test_record_level_privacy_corrects_after_the_noise(text_config: Make, tmp_path: Path) -> None:
    private = {"privacy__level": "record", "privacy__noise_multiplier": 1.0, "strategy__name": "scaffold"}
    outcome = simulate(text_config(federation__rounds=2, **private), tmp_path / "run")
    assert outcome.reason == "completed"
    assert list((tmp_path / "run" / "clients").glob("*/state/*.safetensors"))
