"""The linear algebra in factor space against dense products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.errors import AdapterError, TooFewClientsError
from fedpeft.strategies.algebra import factors as fs
from tests.strategies.oracles import LAYERS, Cohort, cohorts, dense_error, ideal, make_cohort


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error_of(clients: Sequence[LoraFactors], sent: LoraFactors, rows: Sequence[int] = (1, 1, 1, 1, 1)) -> float:
    """Return the aggregation error of a single layer."""
    cohort = [ClientUpdate(str(k), count, {"": f}) for k, (f, count) in enumerate(zip(clients, rows, strict=False))]
    return fs.aggregation_error(cohort, {"": sent})


@settings(max_examples=25, deadline=None)
@given(cohorts())
def test_the_stacks_multiply_to_the_weighted_sum_of_products(cohort: Cohort) -> None:
    weights = fs.client_weights(cohort.updates)
    for layer, target in ideal(cohort.updates).items():
        B, A = fs.stack([u.factors[layer] for u in cohort.updates], weights)
        torch.testing.assert_close(B @ A, target, rtol=0, atol=1e-12)


def test_weights_are_shares_of_all_rows() -> None:
    assert fs.client_weights(make_cohort(rows=(5, 1, 14)).updates) == [5 / 20, 1 / 20, 14 / 20]


def test_a_cohort_without_rows_is_refused() -> None:
    idle = [replace(u, num_examples=0) for u in make_cohort().updates]
    for updates in (idle, []):
        with pytest.raises(TooFewClientsError, match="0 rows"):
            fs.client_weights(updates)


def test_adapters_of_different_layers_are_refused_by_name() -> None:
    cohort = make_cohort()
    update = replace(cohort.updates[0], factors={LAYERS[0]: cohort.updates[0].factors[LAYERS[0]]})
    with pytest.raises(AdapterError, match=r"client '0'.*encoder\.1\.query"):
        fs.require_layers(update, cohort.current)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(40, 9, 2), (9, 40, 3), (6, 8, 20), (700, 3, 2), (700, 3, 400)])
def test_norm_and_inner_product_equal_the_dense_ones(d_out: int, d_in: int, rank: int) -> None:
    B, A = normal(d_out, rank, seed=1), normal(rank, d_in, seed=2)
    B2, A2 = normal(d_out, 4, seed=3), normal(4, d_in, seed=4)
    assert fs.norm(B, A) == pytest.approx(float((B @ A).norm()), rel=1e-12)
    assert fs.inner(B, A, B2, A2) == pytest.approx(float(((B @ A) * (B2 @ A2)).sum()), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(cohorts())
def test_the_aggregation_error_equals_the_dense_one(cohort: Cohort) -> None:
    # any adapter will do as what was sent; this one is far from the mean, and of other rank and scaling
    sent = AdapterState({layer: replace(f, scaling=0.7) for layer, f in cohort.updates[0].factors.items()})
    expected = dense_error(cohort.updates, sent)
    assert fs.aggregation_error(cohort.updates, sent.factors) == pytest.approx(expected, abs=1e-12)
    for layer, target in ideal(cohort.updates).items():
        expected = float((target - sent.factors[layer].product()).norm() / target.norm())
        alone = fs.aggregation_error(cohort.updates, {layer: sent.factors[layer]})
        assert alone == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("d_out", [200, 13], ids=["by QR", "by rows"])
def test_an_exact_method_shows_no_error_beyond_rounding(d_out: int) -> None:
    clients = [LoraFactors(normal(3, 90, seed=k), normal(d_out, 3, seed=k + 9), 2.0) for k in range(5)]
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    B, A = fs.stack(clients, weights)
    assert error_of(clients, LoraFactors(A, B / 8.0, 8.0), rows=[10, 20, 30, 15, 25]) < 1e-14


def test_the_layers_of_a_state_count_as_one_vector() -> None:
    cohort = make_cohort()
    exact = {
        layer: LoraFactors(A, B, 1.0)
        for layer in LAYERS
        for B, A in [fs.stack([u.factors[layer] for u in cohort.updates], fs.client_weights(cohort.updates))]
    }
    nothing = replace(exact[LAYERS[1]], B=torch.zeros_like(exact[LAYERS[1]].B))
    target = ideal(cohort.updates)
    both = math.hypot(float(target[LAYERS[0]].norm()), float(target[LAYERS[1]].norm()))
    error = fs.aggregation_error(iter(cohort.updates), {**exact, LAYERS[1]: nothing})
    assert error == pytest.approx(float(target[LAYERS[1]].norm()) / both, rel=1e-12)


def test_where_clients_learned_nothing_only_sending_nothing_is_exact() -> None:
    idle = LoraFactors(normal(2, 5), torch.zeros(30, 2, dtype=torch.float64), 1.0)
    assert error_of([idle, idle], idle) == 0.0
    assert error_of([idle], replace(idle, B=normal(30, 2))) == math.inf


def test_single_precision_adapters_are_measured_in_double() -> None:
    client = LoraFactors(normal(2, 50).float(), normal(60, 2).float(), 1.0)
    twice = replace(client, scaling=1 + 1e-9)
    assert error_of([client], twice) == pytest.approx(1e-9, rel=1e-4)


def test_what_an_adapter_began_with_is_no_part_of_the_updates_size() -> None:
    cohort = make_cohort()
    offset = make_cohort(seed=7).updates[0].factors
    sent = make_cohort(seed=8).updates[0].factors
    exact = ideal(cohort.updates)
    residual = sum(float((exact[layer] - sent[layer].product()).square().sum()) for layer in LAYERS)
    size = sum(float((exact[layer] - offset[layer].product()).square().sum()) for layer in LAYERS)
    assert fs.aggregation_error(cohort.updates, sent, offset) == pytest.approx((residual / size) ** 0.5, abs=1e-12)
