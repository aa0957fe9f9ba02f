"""raFLoRA against dense sums over partitions of ranks, and the collapse that it prevents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.errors import AdapterError
from fedpeft.strategies.algebra.means import mean_dense, weighted_mean
from fedpeft.strategies.flexlora import FlexLora
from fedpeft.strategies.raflora import RaFLora, rank_weights
from fedpeft.strategies.rounds.ranks import cut
from tests.strategies.oracles import (
    LAYERS,
    Cohort,
    assert_close,
    cohorts,
    ideal,
    make,
    make_cohort,
    per_layer,
    products,
    share_a,
)


def raflora(cohort: Cohort) -> AdapterState:
    return make(RaFLora).aggregate(iter(cohort.updates), cohort.current)


def mixed(rows: tuple[int, ...] = (5, 1, 14), rank: int = 4) -> Cohort:
    """Return clients of three ranks and scalings; of rank 4, an adapter that has learned."""
    cohort = make_cohort(0, rows, (4, 1, 2), (2.0, 0.25, 3.0), rank=rank)
    learned = make_cohort(9, ranks=(rank,) * 3).updates[0].factors
    return Cohort(cohort.updates, replace(cohort.current, factors=learned))


def dense_sum(cohort: Cohort) -> dict[str, Tensor]:
    """Return DW' slice by slice, as the paper writes it."""
    boundaries = sorted({f.rank for u in cohort.updates for f in u.factors.values()})
    found = {}
    for layer, f in cohort.current.factors.items():
        total, low = torch.zeros(f.B.shape[0], f.A.shape[1], dtype=torch.float64), 0
        for high in boundaries:
            holders = [u for u in cohort.updates if u.factors[layer].rank >= high]
            rows = sum(u.num_examples for u in holders)
            for u in holders:
                g = u.factors[layer]
                total += u.num_examples / rows * g.scaling * g.B[:, low:high] @ g.A[low:high]
            low = high
        found[layer] = total + f.scaling * f.B[:, low:] @ f.A[low:]
    return found


def best(target: Tensor, rank: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(target, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


@settings(max_examples=50, deadline=None)
@given(cohorts())
def test_the_result_is_the_best_approximation_of_the_sum_over_partitions(cohort: Cohort) -> None:
    largest = max(f.rank for u in cohort.updates for f in u.factors.values())
    current = make_cohort(3, ranks=(largest,), rows=(1,), scalings=(1.0,)).updates[0].factors
    shapes = cohort.current.factors[LAYERS[0]]
    d_in, d_out = shapes.A.shape[1], shapes.B.shape[0]
    started = {n: replace(f, A=f.A.repeat(1, 2)[:, :d_in], B=f.B.repeat(2, 1)[:d_out]) for n, f in current.items()}
    cohort = Cohort(cohort.updates, replace(cohort.current, factors=started))
    merged = raflora(cohort)
    assert_close(products(merged), {n: best(target, largest) for n, target in dense_sum(cohort).items()}, 1e-9)
    assert_close(merged.dense, mean_dense(cohort.updates, cohort.current))


def test_weights_by_hand() -> None:
    found = rank_weights([2, 4, 2, 3], [0.1, 0.2, 0.3, 0.4])
    expected = [[0.1, 0.1, 0, 0], [0.2, 0.2, 1 / 3, 1], [0.3, 0.3, 0, 0], [0.4, 0.4, 2 / 3, 0]]
    assert_close({"": found}, {"": torch.tensor(expected, dtype=torch.float64)})
    assert_close({"": found.sum(dim=0)}, {"": torch.ones(4, dtype=torch.float64)})


def test_ranks_that_nobody_has_this_time_stay_as_they_were() -> None:
    cohort = mixed(rank=4)
    small = Cohort(cohort.updates[1:], cohort.current)  # of ranks 1 and 2
    assert_close(products(raflora(small)), {n: best(t, 4) for n, t in dense_sum(small).items()})
    one = Cohort(cohort.updates[2:], cohort.current)  # of rank 2
    for layer, f in cohort.current.factors.items():
        expected = ideal(one.updates)[layer] + f.scaling * f.B[:, 2:] @ f.A[2:]
        assert_close({layer: raflora(one).factors[layer].product()}, {layer: expected})


@settings(max_examples=25, deadline=None)
@given(cohorts(mixed=False))
def test_with_equal_ranks_it_is_flexlora(cohort: Cohort) -> None:
    expected = make(FlexLora).aggregate(iter(cohort.updates), cohort.current)
    assert_close(products(raflora(cohort)), products(expected), 1e-9)


@settings(max_examples=15, deadline=None)
@given(cohorts(mixed=False))
def test_one_client_and_equal_clients_come_back_as_they_are(cohort: Cohort) -> None:
    client = cohort.updates[0]
    for updates in ([client], [replace(client, num_examples=n) for n in (3, 8, 1)]):
        assert_close(products(raflora(Cohort(updates, cohort.current))), ideal([client]))


def test_clients_who_hold_the_first_ranks_of_one_adapter_bring_it_back_whole() -> None:
    """Nobody has trained: FlexLoRA's mean shrinks the ranks that few have, round after round; here they stay."""
    spectrum = make(FlexLora).aggregate(iter(make_cohort(ranks=(4, 4, 4)).updates), make_cohort(ranks=(4,) * 3).current)
    first = make_cohort(rows=(6, 3, 1), ranks=(4, 1, 2)).updates
    states = {r: cut(spectrum, r, 8.0 / r) for r in (4, 1, 2)}
    updates = [replace(u, factors=states[u.factors[LAYERS[0]].rank].factors) for u in first]
    cohort = Cohort(updates, spectrum)
    assert_close(products(raflora(cohort)), products(spectrum))
    shrunk = make(FlexLora).aggregate(iter(updates), spectrum)
    assert all(
        float(shrunk.factors[n].product().norm()) < 0.95 * float(p.norm()) for n, p in products(spectrum).items()
    )


def test_neither_the_order_of_clients_nor_a_split_client_matters() -> None:
    cohort = mixed(rows=(6, 2, 2))
    expected = products(raflora(cohort))
    assert_close(products(raflora(Cohort(cohort.updates[::-1], cohort.current))), expected)
    first, *others = cohort.updates
    split = Cohort([replace(first, num_examples=2)] * 3 + others, cohort.current)
    assert_close(products(raflora(split)), expected)


def test_regression_alpha_over_r_is_not_left_out() -> None:
    flat = [per_layer(u, lambda f: LoraFactors(f.A, f.B * f.scaling, 1.0)) for u in mixed().updates]
    assert_close(products(raflora(Cohort(flat, mixed().current))), products(raflora(mixed())))


def test_a_frozen_a_is_sent_back_bit_by_bit_and_the_mean_is_exact() -> None:
    frozen = share_a(make_cohort(scalings=(2.0, 1.0, 4.0)))
    merged = make(RaFLora, frozen_a=True).aggregate(iter(frozen.updates), frozen.current)
    expected = weighted_mean(frozen.updates, frozen.current, trains_a=False).to_tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.to_tensors().items())
    assert_close(products(merged), ideal(frozen.updates))


def test_other_layers_are_refused() -> None:
    cohort = mixed()
    odd = replace(cohort.updates[0], factors={LAYERS[0]: cohort.updates[0].factors[LAYERS[0]]})
    with pytest.raises(AdapterError, match="same layers"):
        raflora(Cohort([odd], cohort.current))
