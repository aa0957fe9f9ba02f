"""FedEx-LoRA against the dense mean of products."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given

from fedpeft.adapters.base_change import dense
from fedpeft.adapters.state import LoraFactors
from fedpeft.strategies.algebra.factors import client_weights
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.fedex_lora import FedExLora, residual
from tests.strategies.oracles import LAYERS, Cohort, cohorts, ideal, make, make_cohort, share_a

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@given(cohorts(mixed=False))
def test_means_and_residual_are_the_mean_of_products(cohort: Cohort) -> None:
    merged = make(FedExLora).aggregate(cohort.updates, cohort.current)
    means = weighted_mean(cohort.updates, cohort.current)
    for layer, expected in ideal(cohort.updates).items():
        assert torch.equal(merged.factors[layer].A, means.factors[layer].A)
        assert torch.equal(merged.factors[layer].B, means.factors[layer].B)
        moved = dense(merged.base[layer]) if layer in merged.base else 0.0
        torch.testing.assert_close(merged.factors[layer].product() + moved, expected, **CLOSE)


@given(cohorts(mixed=False))
def test_the_order_of_clients_changes_nothing(cohort: Cohort) -> None:
    one, other = (
        make(FedExLora).aggregate(updates, cohort.current) for updates in (cohort.updates, cohort.updates[::-1])
    )
    for layer in one.base:
        torch.testing.assert_close(dense(one.base[layer]), dense(other.base[layer]), **CLOSE)


def test_the_residual_has_one_clients_ranks_less_than_the_stack() -> None:
    cohort = make_cohort(rows=(1, 2, 3), ranks=(2, 2, 2), scalings=(2.0,) * 3, d_in=40, d_out=50)
    found = residual(
        [u.factors[LAYERS[0]] for u in cohort.updates],
        client_weights(cohort.updates),
        weighted_mean(cohort.updates, cohort.current).factors[LAYERS[0]],
    )
    assert isinstance(found, LoraFactors)
    assert found.rank == 4
    assert FedExLora.step_size(40, 50, [2, 2, 2]) == 4 * 90


def test_one_client_and_a_shared_frozen_a_leave_no_residual() -> None:
    alone = make_cohort(rows=(5,), ranks=(3,), scalings=(2.0,))
    assert not make(FedExLora).aggregate(alone.updates, alone.current).base
    shared = share_a(make_cohort())
    merged = make(FedExLora, frozen_a=True).aggregate(shared.updates, shared.current)
    assert not merged.base
    for layer, expected in ideal(shared.updates).items():
        torch.testing.assert_close(merged.factors[layer].product(), expected, **CLOSE)


def test_rounds_add_up() -> None:
    """Two rounds whose clients go on from the means: the whole is the sum of what each round ought to do."""
    cohort = make_cohort()
    strategy = make(FedExLora)
    first = strategy.aggregate(cohort.updates, cohort.current)
    moved_again = [
        replace(
            u,
            factors={
                layer: replace(f, A=first.factors[layer].A + 0.1 * f.A, B=first.factors[layer].B + 0.1 * f.B)
                for layer, f in u.factors.items()
            },
        )
        for u in cohort.updates
    ]
    second = strategy.aggregate(moved_again, first)
    for layer in LAYERS:
        whole = dense(first.base[layer]) + ideal(moved_again)[layer]  # base then, and the exact new adapter
        torch.testing.assert_close(second.factors[layer].product() + dense(second.base[layer]), whole, **CLOSE)
