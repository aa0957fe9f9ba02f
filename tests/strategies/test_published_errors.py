"""Errors seen in published code, each of which would change a ranking of methods; none can come back unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.base_change import dense
from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.config import configure
from fedpeft.resident import resident
from fedpeft.strategies import STRATEGIES, with_typed_options
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.fedex_lora import FedExLora
from fedpeft.strategies.fedit import FedIt
from fedpeft.strategies.fedsvd import FedSvd
from fedpeft.strategies.flexlora import FlexLora
from fedpeft.strategies.flora import FLora
from fedpeft.strategies.hetlora import HetLora
from fedpeft.wire import TrainOrder, to_record, to_tensors
from tests.strategies.oracles import LAYERS, ideal, make, make_cohort, mean, share_a
from tests.strategies.test_base import A, FunctionGrid, initial, reply_with

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LAYER = LAYERS[0]


def test_a_fedit_baseline_that_uses_client_0_only() -> None:
    cohort = make_cohort(rows=(5, 1, 14))
    merged = make(FedIt).aggregate(cohort.updates, cohort.current).factors[LAYER]
    torch.testing.assert_close(merged.A, mean([u.factors[LAYER].A for u in cohort.updates], cohort.updates), **CLOSE)
    torch.testing.assert_close(merged.B, mean([u.factors[LAYER].B for u in cohort.updates], cohort.updates), **CLOSE)


def test_a_residual_added_transposed() -> None:
    # on a square layer the shapes would not tell
    cohort = make_cohort(d_in=7, d_out=7)
    merged = make(FedExLora).aggregate(cohort.updates, cohort.current)
    expected = ideal(cohort.updates)[LAYERS[0]]
    moved = dense(merged.base[LAYERS[0]])
    torch.testing.assert_close(merged.factors[LAYERS[0]].product() + moved, expected, **CLOSE)
    assert torch.dist(merged.factors[LAYERS[0]].product() + moved.T, expected) > 1


@pytest.mark.parametrize("method", [FlexLora, FedSvd])
def test_the_root_of_s_in_place_of_s_after_an_svd(method: type[AdapterStrategy]) -> None:
    cohort = make_cohort(rows=(5,), ranks=(3,), scalings=(2.0,))  # of rank 3, so that nothing is truncated
    frozen_a = method is FedSvd
    cohort = share_a(cohort) if frozen_a else cohort
    cohort = replace(cohort, current=replace(cohort.current, factors=cohort.updates[0].factors))
    merged = make(method).aggregate(cohort.updates, cohort.current).factors[LAYER]
    torch.testing.assert_close(merged.product(), ideal(cohort.updates)[LAYER], **CLOSE)


def test_alpha_over_r_left_out_when_folding_into_the_base() -> None:
    cohort = make_cohort(scalings=(0.25, 3.0, 1.0), ranks=(1, 2, 3), output_scaling=2.0)
    base = make(FLora).aggregate(cohort.updates, cohort.current).base
    moved = {layer: dense(change) for layer, change in base.items()}
    torch.testing.assert_close(moved[LAYER], ideal(cohort.updates)[LAYER], **CLOSE)
    total = sum(u.num_examples for u in cohort.updates)
    without = sum(u.num_examples / total * (u.factors[LAYERS[0]].B @ u.factors[LAYERS[0]].A) for u in cohort.updates)
    assert torch.dist(moved[LAYERS[0]], without) > 0.1


def test_padded_ranks_that_receive_gradient_noise() -> None:
    """Clients are sent, and may send back, their own ranks alone."""
    seen: dict[str, tuple[int, int, float]] = {}

    def client(message: Message) -> Message:
        order = TrainOrder.from_record(message.content)
        sent = to_tensors(order.arrays)
        seen[str(message.metadata.dst_node_id)] = (order.rank, len(sent[A]), order.scaling)
        return reply_with(message, {name: tensor + 0.1 for name, tensor in sent.items()})

    strategy = HetLora(client_ids={1: "1", 2: "2"}, scaling=2.0, ranks=(1, 2))
    strategy.start(FunctionGrid({1: client, 2: client}), to_record(initial()), 2)
    assert seen == {"1": (1, 1, 4.0), "2": (2, 2, 2.0)}
    padded = strategy.start(FunctionGrid({1: full_rank, 2: client}), to_record(initial()), 1)
    assert strategy.loop is not None
    assert strategy.loop.report is not None
    assert "expected (1, 5)" in strategy.loop.report.faults[0].reason
    assert padded.arrays is not None


def full_rank(message: Message) -> Message:
    """Answer with rank 2, whatever was asked for."""
    return reply_with(message, initial())


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("local", "fed-sb", "fedsa-lora")])
def test_means_unweighted_while_products_are_weighted(name: str) -> None:
    """Rows must count in every method: a client of a hundred times the rows decides."""
    cohort = make_cohort(rows=(1000, 1, 1))
    if name in ("rolora", "fedsvd"):
        cohort = share_a(cohort)
    weighted = merged(name, cohort.updates, cohort.current)
    head = mean([u.dense["classifier.weight"] for u in cohort.updates], cohort.updates)
    torch.testing.assert_close(weighted.pop("classifier.weight"), head)
    equal = merged(name, [replace(update, num_examples=1) for update in cohort.updates], cohort.current)
    moved = [n for n in weighted if weighted[n].shape != equal[n].shape or not torch.allclose(weighted[n], equal[n])]
    assert moved or name == "hetlora"  # whose weights are norms, by design


def merged(name: str, updates: list[ClientUpdate], current: AdapterState) -> dict[str, Tensor]:
    return make(STRATEGIES[name]).aggregate(updates, current).to_tensors()


def test_sample_counts_forced_to_1() -> None:
    """The weights are the rows that clients report, through the whole of a round."""

    def client(value: float, rows: int) -> object:
        return lambda message: reply_with(message, {n: torch.full_like(t, value) for n, t in initial().items()}, rows)

    grid = FunctionGrid({1: client(0.0, 1), 2: client(1.0, 3)})  # type: ignore[dict-item]
    result = FedIt(client_ids={1: "1", 2: "2"}).start(grid, to_record(initial()), 1)
    assert torch.equal(to_tensors(result.arrays)[A], torch.full((2, 5), 0.75))


def test_a_head_that_is_local_in_one_method_and_shared_in_another() -> None:
    """The configuration decides; where it says nothing each method's record does, and the run's configuration tells."""
    kept = {name for name, method in STRATEGIES.items() if method.capabilities.head == "local"}
    assert kept == {"fedsa-lora", "local"}  # the personalised ones
    for name, method in STRATEGIES.items():
        config = configure({"strategy.name": name}, preset="digits")
        assert with_typed_options(config).adapter.head == method.capabilities.head
        config = configure({"strategy.name": name, "adapter.head": "frozen"}, preset="digits")
        assert with_typed_options(config).adapter.head == "frozen"
    for name, method in STRATEGIES.items():
        for number in (1, 2, 3):
            shared = {str(role) for role in method.exchange(number).trained - method.exchange(number).personal}
            assert ("head" in shared) == (name != "local")
    heads = {}
    for head in ("shared", "local", "frozen"):
        adapted: AdaptedModel = resident(configure({"adapter.head": head}, preset="digits")).adapted
        names = [n for n in adapted.initial if "classifier" in n]
        heads[head] = [all(n in group for n in names) for group in (adapted.trained, adapted.personal, adapted.frozen)]
    assert heads == {
        "shared": [True, False, False],
        "local": [True, True, False],
        "frozen": [False, False, True],
    }
