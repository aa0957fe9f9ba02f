"""FlexLoRA against the truncated singular value decomposition of the dense mean of products."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.errors import AdapterError, ConfigError, TooFewClientsError
from fedpeft.strategies.algebra.factors import client_weights
from fedpeft.strategies.algebra.means import mean_dense, weighted_mean
from fedpeft.strategies.algebra.spectra import best_rank, decompose, sketch
from fedpeft.strategies.flexlora import FlexLora
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


def mixed(rank: int = 2, output_scaling: float = 2.0, d_in: int = 7, d_out: int = 11) -> Cohort:
    return make_cohort(
        0, ranks=(3, 1, 2), scalings=(2.0, 0.25, 3.0), d_in=d_in, d_out=d_out, output_scaling=output_scaling, rank=rank
    )


def flex(cohort: Cohort, **options: Any) -> AdapterState:
    return make(FlexLora, **options).aggregate(iter(cohort.updates), cohort.current)


def truncated(cohort: Cohort, rank: int | None = None) -> dict[str, Tensor]:
    """Return the best approximation of DW, dense, of each layer."""
    best = {}
    for layer, target in ideal(cohort.updates).items():
        U, S, Vt = torch.linalg.svd(target, full_matrices=False)
        r = rank or cohort.current.factors[layer].rank
        best[layer] = (U[:, :r] * S[:r]) @ Vt[:r]
    return best


def without(cohort: Cohort, *columns: int) -> Cohort:
    """Zero some columns of every client's B."""
    dead = torch.tensor(columns)
    return Cohort(
        [per_layer(u, lambda f: replace(f, B=f.B.index_fill(1, dead, 0.0))) for u in cohort.updates], cohort.current
    )


def decaying(rate: float = 0.6, clients: int = 8, r: int = 4, d_in: int = 60, d_out: int = 90) -> Cohort:
    """Return clients whose ranks, all 32 of them, shrink geometrically."""
    cohort = make_cohort(1, [2 + k for k in range(clients)], [r] * clients, [2.0] * clients, d_in, d_out)

    def shrunk(f: LoraFactors, k: int) -> LoraFactors:
        return replace(f, B=f.B * rate ** (clients * torch.arange(r, dtype=torch.float64) + k))

    updates = [per_layer(u, partial(shrunk, k=k)) for k, u in enumerate(cohort.updates)]
    return Cohort(updates, cohort.current)


@settings(max_examples=60, deadline=None)
@given(cohorts())
def test_the_product_is_the_truncated_svd_of_the_dense_mean(cohort: Cohort) -> None:
    merged = flex(cohort)
    assert_close(products(merged), truncated(cohort))
    assert_close(merged.dense, mean_dense(cohort.updates, cohort.current))
    for layer, f in cohort.current.factors.items():
        assert (merged.factors[layer].A.shape, merged.factors[layer].B.shape) == (f.A.shape, f.B.shape)
        assert merged.factors[layer].scaling == f.scaling


@settings(max_examples=40, deadline=None)
@given(cohorts())
def test_singular_values_are_those_of_the_dense_mean(cohort: Cohort) -> None:
    weights = client_weights(cohort.updates)
    for layer, target in ideal(cohort.updates).items():
        S = decompose([u.factors[layer] for u in cohort.updates], weights).S
        expected = torch.linalg.svdvals(target)
        assert len(S) == int(torch.linalg.matrix_rank(target))
        assert_close({"S": S}, {"S": expected[: len(S)]})


@pytest.mark.parametrize(("d_in", "d_out"), [(7, 11), (30, 4), (4, 30)])
def test_at_full_rank_it_is_exact(d_in: int, d_out: int) -> None:
    full = mixed(min(d_in, d_out, 6), d_in=d_in, d_out=d_out)
    assert_close(products(flex(full)), ideal(full.updates))
    less = mixed(min(d_in, d_out, 6) - 1, d_in=d_in, d_out=d_out)
    assert dense_error(less.updates, flex(less)) > 1e-4


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_first_ranks_are_the_best_approximation_of_a_smaller_client(rank: int) -> None:
    cohort = make_cohort(ranks=(4, 2, 3), rank=4)
    sliced = {layer: replace(f, A=f.A[:rank], B=f.B[:, :rank]).product() for layer, f in flex(cohort).factors.items()}
    assert_close(sliced, truncated(cohort, rank))


@settings(max_examples=20, deadline=None)
@given(cohorts(mixed=False))
def test_one_client_and_equal_clients_come_back_as_they_are(cohort: Cohort) -> None:
    client = cohort.updates[0]
    for updates in ([client], [replace(client, num_examples=n) for n in (3, 8, 1)]):
        assert_close(products(flex(Cohort(updates, cohort.current))), ideal([client]))


def test_neither_the_order_of_clients_nor_of_one_clients_ranks_matters() -> None:
    cohort = mixed()
    expected = products(flex(cohort))
    assert_close(products(flex(Cohort(cohort.updates[::-1], cohort.current))), expected)
    first, *others = cohort.updates
    assert_close(products(flex(Cohort([permuted(first, (2, 0, 1)), *others], cohort.current))), expected)
    assert dense_error(cohort.updates, flex(Cohort(others, cohort.current))) > 0.1  # products tell clients apart


def test_factors_are_balanced_orthogonal_and_of_a_fixed_sign() -> None:
    cohort = mixed()
    for f in flex(cohort).factors.values():
        left, right = (f.scaling * f.B).T @ (f.scaling * f.B), f.A @ f.A.T
        assert_close({"gram": left}, {"gram": right})
        assert_close({"gram": right}, {"gram": right.diag().diag()})
        largest = f.B.gather(0, f.B.abs().argmax(dim=0, keepdim=True))
        assert bool((largest > 0).all())


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_equal_inputs_give_equal_bytes(solver: str) -> None:
    tensors = [flex(mixed(), solver=solver).to_tensors() for _ in range(2)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_ranks_that_dw_lacks_can_learn_and_leave_the_product_as_it_is(solver: str) -> None:
    cohort = without(share_a(make_cohort()), 2)  # rank 2 in all, rows 0 and 1 of the adapter's A
    merged = flex(cohort, solver=solver)
    assert_close(products(merged), ideal(cohort.updates))
    for layer, f in merged.factors.items():
        own = cohort.current.factors[layer].A
        assert not f.B[:, 2].any()
        assert torch.equal(f.A[2], own[2])  # a row that the other two span would not reach what they had reached
        assert float(torch.linalg.svdvals(f.A)[-1]) > 0.1


def test_where_dw_is_zero_the_adapter_keeps_all_rows_of_a() -> None:
    cohort = without(make_cohort(), 0, 1, 2)
    for layer, f in flex(cohort).factors.items():
        assert not f.B.any()
        assert sorted(f.A.tolist()) == sorted(cohort.current.factors[layer].A.tolist())


@pytest.mark.parametrize("rate", [0.6, 0.85])
def test_the_randomized_solver_comes_close_to_the_best_on_decaying_spectra(rate: float) -> None:
    cohort = decaying(rate)
    best = dense_error(cohort.updates, flex(cohort))
    sketched = dense_error(cohort.updates, flex(cohort, solver="randomized"))
    assert best <= sketched * (1 + 1e-12)
    assert sketched <= best * (1 + 1e-3)
    crude = dense_error(cohort.updates, flex(cohort, solver="randomized", oversampling=0, power_iterations=0))
    assert crude > best * (1 + 1e-3)  # so that the two options do something


def test_the_randomized_solver_is_exact_where_its_range_holds_all_of_dw() -> None:
    cohort = mixed()
    assert_close(products(flex(cohort, solver="randomized", oversampling=4)), truncated(cohort))


def test_power_iterations_keep_small_directions() -> None:
    """Unless orthogonalised at each step, a range multiplied ten times by DW DW^T holds the first direction only."""
    cohort = decaying(0.1)
    factors, weights = [u.factors[LAYERS[0]] for u in cohort.updates], client_weights(cohort.updates)
    S = sketch(factors, weights, 10, 10, np.random.default_rng(0)).S
    torch.testing.assert_close(S, decompose(factors, weights).S[:10], rtol=1e-5, atol=0)


def in_float32(cohort: Cohort) -> Cohort:
    return Cohort(
        [per_layer(u, lambda f: replace(f, A=f.A.to(torch.float32), B=f.B.to(torch.float32))) for u in cohort.updates],
        cohort.current,
    )


@pytest.mark.parametrize(("d_in", "d_out"), [(60, 90), (90, 60), (20, 90)])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.85, 1.0])
def test_uploads_in_float32_are_approximated_as_well_as_can_be(rate: float, d_in: int, d_out: int) -> None:
    """Of 32 ranks 4 are kept. The products themselves differ where S_4 and S_5 are close, as at rate 1."""
    cohort = in_float32(decaying(rate, d_in=d_in, d_out=d_out))
    target, best, sent = ideal(cohort.updates), truncated(cohort), products(flex(cohort))
    for layer, product in sent.items():
        least = float((target[layer].double() - best[layer].double()).norm())
        assert float((target[layer].double() - product).norm()) <= least * (1 + 1e-6) + 1e-6 * float(product.norm())


def test_float32_uploads_of_lower_rank_leave_what_is_missing_to_be_learned() -> None:
    cohort = in_float32(without(share_a(make_cohort()), 2))
    for layer, f in flex(cohort).factors.items():
        assert_close({layer: f.product()}, {layer: ideal(cohort.updates)[layer].double()}, tolerance=1e-6)
        assert not f.B[:, 2].any()


def test_regression_s_is_split_not_rooted_away() -> None:
    """A published merge has sqrt(S) where S belongs: the product then has singular values sqrt(S)."""
    cohort = make_cohort(rows=(4,), ranks=(3,), scalings=(2.0,))
    for layer, sent in products(flex(cohort)).items():
        S = torch.linalg.svdvals(ideal(cohort.updates)[layer])[:3]
        assert_close({"S": torch.linalg.svdvals(sent)[:3]}, {"S": S})
        assert float((S.sqrt() - S).abs().min()) > 0.1


@pytest.mark.parametrize("output_scaling", [0.5, 1.0, 4.0])
def test_regression_alpha_over_r_is_not_left_out(output_scaling: float) -> None:
    """Neither of clients nor of the result: leaving out either changes the product by its factor."""
    cohort = mixed(output_scaling=output_scaling)
    expected = truncated(mixed())
    assert_close(products(flex(cohort)), expected)
    doubled = [per_layer(u, lambda f: replace(f, scaling=2 * f.scaling)) for u in cohort.updates]
    assert_close(products(flex(Cohort(doubled, cohort.current))), {n: 2 * p for n, p in expected.items()})


def test_regression_products_and_the_head_are_weighted_with_rows() -> None:
    cohort = make_cohort(rows=(6, 2, 2), rank=6)
    first, *others = cohort.updates
    split = Cohort([replace(first, num_examples=2)] * 3 + others, cohort.current)
    assert_close(products(flex(cohort)), products(flex(split)))
    assert_close(flex(cohort).dense, flex(split).dense)
    even = Cohort([replace(u, num_examples=1) for u in cohort.updates], cohort.current)
    assert dense_error(cohort.updates, flex(even)) > 0.1


@settings(max_examples=15, deadline=None)
@given(cohorts(mixed=False), st.sampled_from(["exact", "randomized"]))
def test_a_frozen_a_stays_and_the_mean_is_exact(cohort: Cohort, solver: str) -> None:
    frozen = share_a(cohort)
    merged = make(FlexLora, frozen_a=True, solver=solver).aggregate(iter(frozen.updates), frozen.current)
    assert_close(products(merged), ideal(frozen.updates))
    expected = weighted_mean(frozen.updates, frozen.current, trains_a=False).to_tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.to_tensors().items())


def test_the_result_has_the_adapters_types_and_best_rank_takes_any_rank() -> None:
    cohort = mixed()
    factors = [u.factors[LAYERS[0]] for u in cohort.updates]
    f = cohort.current.factors[LAYERS[0]]
    half = replace(f, A=f.A.to(torch.float32), B=f.B.to(torch.float32))
    merged = best_rank(factors, client_weights(cohort.updates), 5, half)
    assert (merged.A.dtype, merged.B.dtype, merged.rank) == (torch.float32, torch.float32, 5)
    expected = truncated(cohort, 5)[LAYERS[0]].to(torch.float32)
    torch.testing.assert_close(merged.product(), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_is_refused() -> None:
    cohort = make_cohort()
    with pytest.raises(ConfigError, match="solver"):
        make(FlexLora, solver="fast")
    with pytest.raises(TooFewClientsError):
        flex(Cohort([replace(u, num_examples=0) for u in cohort.updates], cohort.current))
    odd = replace(cohort.updates[0], factors={LAYERS[0]: cohort.updates[0].factors[LAYERS[0]]})
    with pytest.raises(AdapterError, match="same layers"):
        flex(Cohort([odd], cohort.current))
