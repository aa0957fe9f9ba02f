"""Clients of different ranks, for every method that merges them."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedpeft.adapters.state import AdapterState
from fedpeft.config import configure
from fedpeft.errors import ConfigError
from fedpeft.strategies import STRATEGIES, with_typed_options
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.flexlora import FlexLora
from fedpeft.strategies.lora_lego import LoraLego, merge_layers
from fedpeft.wire import TrainOrder, to_record, to_tensors
from tests.strategies.oracles import LAYERS, make_cohort
from tests.strategies.rounds.test_exchange import drawn
from tests.strategies.test_base import A, B, FunctionGrid, initial, reply_with

MIXED = [method for method in STRATEGIES.values() if method.capabilities.mixed_ranks]


def test_the_methods_that_merge_mixed_ranks() -> None:
    assert {method.name for method in MIXED} == {"flora", "flexlora", "raflora", "hetlora", "lora-lego", "florist"}


@pytest.mark.parametrize("method", MIXED)
def test_clients_train_their_own_ranks_in_every_round(method: type[AdapterStrategy]) -> None:
    seen: dict[int, list[tuple[int, int]]] = {1: [], 2: [], 3: []}

    def client(message: Message) -> Message:
        order = TrainOrder.from_record(message.content)
        sent = to_tensors(order.arrays)
        rank, node = order.rank, message.metadata.dst_node_id
        begun = drawn(order.draw)
        tensors: dict[str, Tensor] = {A: begun[A][:rank], B: begun[B][:, :rank], **sent}
        seen[node].append((rank, len(tensors[A])))
        noise = torch.Generator().manual_seed(node)
        trained = {n: tensors[n] + torch.randn(tensors[n].shape, generator=noise) for n in initial()}
        return reply_with(message, trained)

    strategy = method(client_ids={1: "1", 2: "2", 3: "3"}, scaling=2.0, ranks=(1, 2))
    strategy.start(FunctionGrid({1: client, 2: client, 3: client}), to_record(initial()), 3)
    for node, rank in ((1, 1), (2, 2), (3, 1)):
        assert [asked for asked, _ in seen[node]] == [rank] * 3
        assert all(got <= rank for _, got in seen[node])  # florist may keep fewer than the client could take
        if method.name != "florist":
            assert [got for _, got in seen[node]] == [rank] * 3
    assert strategy.loop is not None
    assert strategy.loop.report is not None
    assert not strategy.loop.report.faults


def test_a_client_of_a_smaller_rank_gets_the_best_approximation_of_that_rank() -> None:
    cohort = make_cohort(ranks=(4, 2, 3), rank=4)
    strategy = FlexLora(ranks=(2, 4), scaling=2.0)
    merged = strategy.aggregate(cohort.updates, cohort.current)
    sent = strategy.view(merged, 2, 4.0).factors[LAYERS[0]]
    U, S, Vt = torch.linalg.svd(merged.factors[LAYERS[0]].product())
    torch.testing.assert_close(sent.product(), (U[:, :2] * S[:2]) @ Vt[:2])


def test_a_client_of_rank_r_gets_r_clusters() -> None:
    cohort = make_cohort(ranks=(4, 2, 3), rank=4)
    strategy = LoraLego(ranks=(2, 4), scaling=2.0, seed=3)
    merged = strategy.aggregate(cohort.updates, cohort.current)
    expected = merge_layers(cohort.updates, cohort.current, 2, "least-squares", 3)
    for layer, f in strategy.view(merged, 2, 4.0).factors.items():
        assert f.scaling == 4.0
        torch.testing.assert_close(f.product(), expected[layer].product())
    again = AdapterState.from_tensors(
        {name.removeprefix("rank-2."): tensor for name, tensor in strategy.memory().items()}, 2.0
    )
    assert again.factors.keys() == expected.keys()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy.name": "fedit"}, "one rank only.*hetlora"),
        ({"strategy.name": "flexlora", "adapter.kind": "ffa-lora"}, "ffa-lora"),
        ({"strategy.name": "lora-lego", "strategy.rank": 3}, "exclude each other"),
        ({"strategy.name": "hetlora", "adapter.rank": 8}, "largest of adapter.ranks"),
    ],
)
def test_ranks_that_cannot_work_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_typed_options(configure({"adapter.ranks": "4,8,16", **settings}, preset="digits"))
