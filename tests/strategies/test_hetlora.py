"""HetLoRA against the formulas of the paper, and its pruning at work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import Message
from hypothesis import given

from fedpeft.adapters.pruning import PRUNED_RANK
from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.errors import ConfigError
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.hetlora import HetLora, sparsity_weights
from fedpeft.strategies.rounds.ranks import Ranks, cut
from fedpeft.wire import TrainOrder, to_record, to_tensors
from tests.strategies.oracles import LAYERS, Cohort, cohorts, make, make_cohort, per_layer
from tests.strategies.test_base import A, B, FunctionGrid, initial, reply_with

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@given(cohorts())
def test_factors_are_zero_padded_means_weighted_with_norms(cohort: Cohort) -> None:
    cohort = Cohort(cohort.updates, make_cohort_of_rank(cohort, max(rank_of(cohort))))
    merged = make(HetLora).aggregate(cohort.updates, cohort.current)
    for layer, f in merged.factors.items():
        norms = torch.stack([u.factors[layer].product().norm() for u in cohort.updates])
        for k, row in enumerate((norms / norms.sum()).tolist()):
            assert sparsity_weights([u.factors[layer] for u in cohort.updates], [])[k] == pytest.approx(row)
        A_sum, B_sum = torch.zeros_like(f.A), torch.zeros_like(f.B)
        for u, w in zip(cohort.updates, norms / norms.sum(), strict=True):
            g = u.factors[layer]
            A_sum += w * torch.cat([g.A, torch.zeros(f.rank - g.rank, f.A.shape[1], dtype=torch.float64)])
            padding = torch.zeros(f.B.shape[0], f.rank - g.rank, dtype=torch.float64)
            B_sum += w * g.scaling / f.scaling * torch.cat([g.B, padding], dim=1)
        torch.testing.assert_close(f.A, A_sum, **CLOSE)
        torch.testing.assert_close(f.B, B_sum, **CLOSE)


def rank_of(cohort: Cohort) -> list[int]:
    return [u.factors[LAYERS[0]].rank for u in cohort.updates]


def make_cohort_of_rank(cohort: Cohort, rank: int) -> AdapterState:
    f = cohort.current.factors[LAYERS[0]]
    return make_cohort(rows=(1,), ranks=(rank,), scalings=(1.0,), d_in=f.A.shape[1], d_out=f.B.shape[0]).current


def test_equal_ranks_norms_and_rows_give_fedit() -> None:
    cohort = make_cohort(rows=(4, 4, 4))
    alike = [per_layer(u, lambda f: replace(f, B=f.B / f.product().norm())) for u in cohort.updates]
    merged, fedit = make(HetLora).aggregate(alike, cohort.current), weighted_mean(alike, cohort.current)
    for layer in LAYERS:
        torch.testing.assert_close(merged.factors[layer].A, fedit.factors[layer].A, **CLOSE)
        torch.testing.assert_close(merged.factors[layer].B, fedit.factors[layer].B, **CLOSE)


def test_a_layer_that_nobody_moved_is_weighted_with_rows() -> None:
    cohort = make_cohort(rows=(1, 3, 4))
    still = [per_layer(u, lambda f: replace(f, B=torch.zeros_like(f.B))) for u in cohort.updates]
    merged, fedit = make(HetLora).aggregate(still, cohort.current), weighted_mean(still, cohort.current)
    torch.testing.assert_close(merged.factors[LAYERS[0]].A, fedit.factors[LAYERS[0]].A, **CLOSE)


def test_a_client_is_sent_its_first_ranks_on_its_own_scale() -> None:
    state = make_cohort(ranks=(4,), rows=(1,), scalings=(1.0,)).updates[0]
    whole = AdapterState(state.factors)
    part = cut(whole, 2, 3.0).factors[LAYERS[0]]
    f = whole.factors[LAYERS[0]]
    torch.testing.assert_close(part.product(), LoraFactors(f.A[:2], f.B[:, :2], f.scaling).product())
    assert part.scaling == 3.0


def test_ranks_are_dealt_in_the_order_of_ids_and_stay() -> None:
    ranks = Ranks((4, 8), lambda rank: 1.0)
    ranks.deal(["10", "2", "1"])
    assert ranks.of == {"1": 4, "2": 8, "10": 4}
    ranks.deal(["2", "3"])
    assert ranks.of["3"] == 8


def test_a_client_that_prunes_itself_keeps_the_rank_and_is_sent_no_more() -> None:
    asked: list[int] = []

    def client(message: Message) -> Message:
        order = TrainOrder.from_record(message.content)
        sent = to_tensors(order.arrays)
        asked.append(len(sent[A]))
        kept = int(order.settings.get(PRUNED_RANK, len(sent[A])))  # type: ignore[arg-type]
        trained = {name: tensor + 1.0 for name, tensor in sent.items()}
        return reply_with(message, {**trained, A: trained[A][:kept], B: trained[B][:, :kept]})

    strategy = HetLora(client_ids={1: "1"}, scaling=2.0, ranks=(2,), prune=0.5)
    result = strategy.start(FunctionGrid({1: client}), to_record(initial()), 3)
    assert asked == [2, 1, 1]
    assert strategy.loop is not None
    assert strategy.loop.memory().facts["ranks"] == {"1": 1}
    merged = to_tensors(result.arrays)
    assert not merged[B][:, 1].any()  # what is pruned is zero in the whole
    assert merged[A].shape == (2, 5)


def test_pruning_needs_ranks() -> None:
    with pytest.raises(ConfigError, match="ranks"):
        HetLora(prune=0.5)
