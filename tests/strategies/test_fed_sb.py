"""Fed-SB: what is sent is exactly the weighted sum of what clients did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.strategies import FedIt, FedSb
from fedpeft.strategies.base import AdapterStrategy
from tests.strategies.oracles import LAYERS, Cohort, assert_close, cohorts, ideal, make_cohort, mean, products

FROZEN = [layer + end for layer in LAYERS for end in (".lora_A.weight", ".lora_B.weight")]


def sharing(cohort: Cohort, seed: int = 0) -> Cohort:
    """Give all clients one A and one B, and each an R and a scaling of its own."""
    draw = torch.Generator().manual_seed(seed)

    def with_r(layer: str, scaling: float) -> LoraFactors:
        shared = cohort.updates[0].factors[layer]
        R = torch.randn(shared.rank, shared.rank, generator=draw, dtype=torch.float64)
        return LoraFactors(shared.A, shared.B, scaling, R)

    updates = [
        replace(u, factors={layer: with_r(layer, f.scaling) for layer, f in u.factors.items()}) for u in cohort.updates
    ]
    start = {layer: with_r(layer, f.scaling) for layer, f in cohort.current.factors.items()}
    return Cohort(updates, AdapterState(start, cohort.current.dense))


@settings(max_examples=30, deadline=None)
@given(cohorts(mixed=False))
def test_the_global_update_is_the_weighted_sum_of_the_clients_updates(cohort: Cohort) -> None:
    shared = sharing(cohort)
    for method in (FedSb, FedIt):
        merged = method(frozen=FROZEN).aggregate(iter(shared.updates), shared.current)
        assert_close(products(merged), ideal(shared.updates))
        heads = [u.dense["classifier.weight"] for u in shared.updates]
        assert_close(merged.dense, {"classifier.weight": mean(heads, shared.updates)})


@pytest.mark.parametrize("method", [FedSb, FedIt])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"robust": "median"},
        {"robust": "krum", "byzantine": 0},
        {"robust": "norm-clip", "max_norm": 1e9},
        {"server_optimizer": "avgm"},
        {"server_optimizer": "adam"},
    ],
)
def test_a_and_b_stay_bit_by_bit_and_r_moves(method: type[AdapterStrategy], options: dict[str, Any]) -> None:
    shared = sharing(make_cohort())
    merged = method(frozen=FROZEN, **options).aggregate(shared.updates, shared.current)
    for layer, f in shared.current.factors.items():
        after = merged.factors[layer]
        assert f.R is not None
        assert after.R is not None
        assert torch.equal(after.A, f.A)
        assert torch.equal(after.B, f.B)
        assert not torch.equal(after.R, f.R)


def test_a_median_of_r_withstands_a_liar() -> None:
    cohort = sharing(make_cohort(scalings=(2.0, 2.0, 2.0)))

    def lying(update: ClientUpdate) -> ClientUpdate:
        return replace(
            update, factors={n: replace(f, R=f.R * 1e6) for n, f in update.factors.items() if f.R is not None}
        )

    updates = [*cohort.updates[:2], lying(cohort.updates[2])]
    plain, robust = (method.aggregate(updates, cohort.current) for method in (FedSb(), FedSb(robust="median")))
    for layer in LAYERS:
        assert products(robust)[layer].abs().max() * 100 < products(plain)[layer].abs().max()
