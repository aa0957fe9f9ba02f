"""FLoRIST against dense singular values and the energy that its threshold promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters.state import AdapterState
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.strategies.algebra.means import mean_dense, weighted_mean
from fedpeft.strategies.florist import Florist, kept_rank
from tests.strategies.oracles import (
    LAYERS,
    Cohort,
    assert_close,
    cohorts,
    dense_error,
    ideal,
    make,
    make_cohort,
    per_layer,
    permuted,
    products,
    share_a,
)


def mixed(output_scaling: float = 2.0) -> Cohort:
    return make_cohort(0, ranks=(3, 1, 2), scalings=(2.0, 0.25, 3.0), output_scaling=output_scaling, rank=2)


def florist(cohort: Cohort, threshold: float = 0.9) -> AdapterState:
    return make(Florist, threshold=threshold).aggregate(iter(cohort.updates), cohort.current)


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.sampled_from([0.05, 0.5, 0.8, 0.9, 0.99, 1.0]))
def test_each_layer_keeps_the_fewest_directions_that_hold_the_energy(cohort: Cohort, threshold: float) -> None:
    merged = florist(cohort, threshold)
    for layer, target in ideal(cohort.updates).items():
        U, S, Vt = torch.linalg.svd(target, full_matrices=False)
        f = merged.factors[layer]
        p, total = f.rank, S.square().sum()
        assert_close({layer: f.product()}, {layer: (U[:, :p] * S[:p]) @ Vt[:p]})
        # |DW - sent|^2 = |DW|^2 - |sent|^2, of which at most 1 - tau is lost; with one rank less it would be more
        lost = (target - f.product()).square().sum() / total
        torch.testing.assert_close(lost, 1 - f.product().square().sum() / total, rtol=0, atol=1e-10)
        assert float(lost) <= 1 - threshold + 1e-12
        if p > 1:
            assert float(S[p - 1 :].square().sum() / total) > 1 - threshold - 1e-12
            assert float(S[p - 1]) > 1e-14 * float(S[0])
        assert f.scaling == cohort.current.factors[layer].scaling
    assert_close(merged.dense, mean_dense(cohort.updates, cohort.current))


@settings(max_examples=40, deadline=None)
@given(cohorts())
def test_the_whole_energy_is_exact_at_the_rank_of_the_mean(cohort: Cohort) -> None:
    merged = florist(cohort, 1.0)
    target = ideal(cohort.updates)
    assert_close(products(merged), target)
    for layer, f in merged.factors.items():
        assert f.rank == int(torch.linalg.matrix_rank(target[layer]))


def test_the_whole_energy_includes_directions_that_are_small_beside_the_first() -> None:
    """Squares of singular values below 1e-8 of the first vanish beside its square; the directions must not."""
    assert kept_rank(torch.tensor([1.0, 1e-9, 1e-11], dtype=torch.float64), 1.0) == 3
    cohort = make_cohort(rows=(4,), ranks=(3,), scalings=(2.0,))
    small = per_layer(cohort.updates[0], lambda f: replace(f, B=f.B * torch.tensor([1.0, 1e-9, 1e-9])))
    assert {f.rank for f in florist(Cohort([small], cohort.current), 1.0).factors.values()} == {3}


@pytest.mark.parametrize(
    ("S", "threshold", "rank"),
    [
        ([3.0, 1.0], 0.9, 1),  # 9 of 10: reached, not passed
        ([3.0, 1.0], 0.91, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.51, 3),
        ([2.0, 0.0], 1.0, 1),
        ([1e-200, 1e-200], 0.6, 2),  # whose squares are 0
        ([5.0, 1.0], 1e-6, 1),
        ([0.0, 0.0], 1.0, 1),
        ([], 0.5, 1),
    ],
)
def test_kept_ranks_by_hand(S: list[float], threshold: float, rank: int) -> None:
    assert kept_rank(torch.tensor(S, dtype=torch.float64), threshold) == rank


def test_a_higher_threshold_keeps_more_and_errs_less() -> None:
    cohort = make_cohort(ranks=(4, 4, 4))
    results = [florist(cohort, tau) for tau in (0.1, 0.5, 0.8, 0.95, 1.0)]
    ranks = [sum(f.rank for f in merged.factors.values()) for merged in results]
    errors = [dense_error(cohort.updates, merged) for merged in results]
    assert ranks == sorted(ranks)
    assert errors == sorted(errors, reverse=True)
    assert ranks[0] < ranks[-1]
    assert errors[0] > 0.5 > 1e-10 > errors[-1]


def test_layers_may_end_at_different_ranks_which_are_not_the_adapters() -> None:
    cohort = make_cohort(rows=(1, 1, 1))
    updates = []
    for update in cohort.updates:
        f = update.factors[LAYERS[0]]
        shrunk = replace(f, B=f.B * torch.tensor([1.0, 1e-3, 1e-3]), A=cohort.updates[0].factors[LAYERS[0]].A)
        updates.append(replace(update, factors={**update.factors, LAYERS[0]: shrunk}))
    merged = florist(Cohort(updates, cohort.current), 0.95)
    assert merged.factors[LAYERS[0]].rank == 1
    assert merged.factors[LAYERS[1]].rank > 3


def test_where_dw_is_zero_one_rank_that_can_learn_is_left() -> None:
    cohort = make_cohort()
    blank = Cohort(
        [per_layer(u, lambda f: replace(f, B=torch.zeros_like(f.B))) for u in cohort.updates], cohort.current
    )
    for layer, f in florist(blank).factors.items():
        assert f.rank == 1
        assert not f.B.any()
        assert f.A[0].tolist() in cohort.current.factors[layer].A.tolist()


@settings(max_examples=20, deadline=None)
@given(cohorts(mixed=False))
def test_one_client_and_equal_clients_come_back_as_they_are(cohort: Cohort) -> None:
    client = cohort.updates[0]
    for updates in ([client], [replace(client, num_examples=n) for n in (3, 8, 1)]):
        assert_close(products(florist(Cohort(updates, cohort.current), 1.0)), ideal([client]))


def test_neither_the_order_of_clients_nor_of_one_clients_ranks_matters() -> None:
    cohort = mixed()
    expected = products(florist(cohort))
    assert_close(products(florist(Cohort(cohort.updates[::-1], cohort.current))), expected)
    first, *others = cohort.updates
    assert_close(products(florist(Cohort([permuted(first, (2, 0, 1)), *others], cohort.current))), expected)
    assert dense_error(cohort.updates, florist(Cohort(others, cohort.current))) > 0.1


def test_regression_s_is_split_not_rooted_away() -> None:
    """sqrt(S) in place of S would change what is sent, though not which ranks are kept."""
    cohort = make_cohort()
    for layer, f in florist(cohort).factors.items():
        S = torch.linalg.svdvals(ideal(cohort.updates)[layer])[: f.rank]
        assert_close({"S": torch.linalg.svdvals(f.product())[: f.rank]}, {"S": S})
        assert float((S.sqrt() - S).abs().max()) > 0.1


def test_regression_alpha_over_r_is_not_left_out() -> None:
    expected = ideal(mixed().updates)
    for output_scaling in (0.5, 1.0, 4.0):
        assert_close(products(florist(mixed(output_scaling), 1.0)), expected)
    flat = [per_layer(u, lambda f: replace(f, scaling=1.0)) for u in mixed().updates]
    assert dense_error(mixed().updates, florist(Cohort(flat, mixed().current), 1.0)) > 0.1


def test_regression_products_and_the_head_are_weighted_with_rows() -> None:
    cohort = make_cohort(rows=(6, 2, 2))
    first, *others = cohort.updates
    split = Cohort([replace(first, num_examples=2)] * 3 + others, cohort.current)
    assert_close(products(florist(cohort)), products(florist(split)))
    assert_close(florist(cohort).dense, florist(split).dense)
    even = Cohort([replace(u, num_examples=1) for u in cohort.updates], cohort.current)
    assert dense_error(cohort.updates, florist(even, 1.0)) > 0.1


@settings(max_examples=15, deadline=None)
@given(cohorts(mixed=False))
def test_a_frozen_a_stays_at_its_rank_and_the_mean_is_exact(cohort: Cohort) -> None:
    frozen = share_a(cohort)
    merged = make(Florist, frozen_a=True, threshold=0.1).aggregate(iter(frozen.updates), frozen.current)
    assert_close(products(merged), ideal(frozen.updates))
    expected = weighted_mean(frozen.updates, frozen.current, trains_a=False).to_tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.to_tensors().items())


def test_what_cannot_be_merged_is_refused() -> None:
    for threshold in (0.0, 1.1):
        with pytest.raises(ConfigError, match="threshold"):
            make(Florist, threshold=threshold)
    cohort = make_cohort()
    odd = replace(cohort.updates[0], factors={LAYERS[0]: cohort.updates[0].factors[LAYERS[0]]})
    with pytest.raises(AdapterError, match="same layers"):
        florist(Cohort([odd], cohort.current))


def test_padding_fills_up_the_ranks_that_the_adapter_began_with_and_changes_no_product() -> None:
    cohort = make_cohort(ranks=(3, 3, 3))
    flat = Cohort([per_layer(u, lambda f: replace(f, A=f.A[[0, 0, 0]])) for u in cohort.updates], cohort.current)
    padded = make(Florist, padding=True, threshold=0.5)
    state = cohort.current
    for _ in range(3):  # the rank that the run began with, not that of the round
        plain = make(Florist, threshold=0.5).aggregate(iter(flat.updates), state)
        state = padded.aggregate(iter(flat.updates), state)
        assert_close(products(state), products(plain))
        for layer, f in state.factors.items():
            kept = plain.factors[layer].rank
            assert kept < 3 == f.rank
            assert not f.B[:, kept:].any()
            assert float(f.A[kept:].norm()) > 0
            assert torch.linalg.matrix_rank(f.A) == 3
    assert {int(rank) for rank in padded.memory().values()} == {3}
    wide = make(Florist, padding=True, threshold=1.0).aggregate(iter(cohort.updates), cohort.current)
    assert {f.rank for f in wide.factors.values()} == {7}  # never cut by it
