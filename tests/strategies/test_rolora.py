"""RoLoRA: one factor a round, exact each round, and half of the bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from fedpeft.adapters.state import AdapterState, LoraFactors, Role
from fedpeft.config import AdapterConfig
from fedpeft.errors import ConfigError
from fedpeft.strategies.rolora import RoLora
from tests.strategies.oracles import Cohort, assert_close, cohorts, ideal, make, per_layer, products, share_a


def share_b(cohort: Cohort) -> Cohort:
    """Give all clients and the current adapter one B and one scaling, as even rounds do."""
    B = {layer: f.B for layer, f in cohort.updates[0].factors.items()}
    current = AdapterState(
        {layer: replace(f, B=B[layer]) for layer, f in cohort.current.factors.items()}, cohort.current.dense
    )
    updates = [
        replace(
            u,
            factors={
                layer: LoraFactors(f.A, B[layer], current.factors[layer].scaling) for layer, f in u.factors.items()
            },
        )
        for u in cohort.updates
    ]
    return Cohort(updates, current)


def merge(cohort: Cohort, server_round: int) -> AdapterState:
    return make(RoLora).aggregate(iter(cohort.updates), cohort.current, server_round)


@settings(max_examples=40, deadline=None)
@given(cohorts(mixed=False))
def test_odd_rounds_average_b_exactly_and_leave_a(cohort: Cohort) -> None:
    cohort = share_a(cohort)
    merged = merge(cohort, 3)
    assert_close(products(merged), ideal(cohort.updates))
    assert all(torch.equal(f.A, cohort.current.factors[layer].A) for layer, f in merged.factors.items())


@settings(max_examples=40, deadline=None)
@given(cohorts(mixed=False))
def test_even_rounds_average_a_exactly_and_leave_b(cohort: Cohort) -> None:
    cohort = share_b(cohort)
    merged = merge(cohort, 2)
    assert_close(products(merged), ideal(cohort.updates))
    assert all(torch.equal(f.B, cohort.current.factors[layer].B) for layer, f in merged.factors.items())


@given(cohorts(mixed=False))
@settings(max_examples=20, deadline=None)
def test_permuting_clients_and_all_ranks_alike_changes_nothing(cohort: Cohort) -> None:
    cohort = share_a(cohort)
    merged = products(merge(cohort, 1))
    assert_close(products(merge(Cohort(cohort.updates[::-1], cohort.current), 1)), merged)
    flipped = [per_layer(u, lambda f: replace(f, A=f.A.flip(0), B=f.B.flip(1))) for u in cohort.updates]
    current = replace(
        cohort.current,
        factors={layer: replace(f, A=f.A.flip(0), B=f.B.flip(1)) for layer, f in cohort.current.factors.items()},
    )
    assert_close(products(merge(Cohort(flipped, current), 1)), merged)


def test_the_first_round_trains_b_because_a_has_no_gradient_while_b_is_zero() -> None:
    assert [RoLora.exchange(number).trained & {Role.A, Role.B} for number in (1, 2, 3)] == [
        {Role.B},
        {Role.A},
        {Role.B},
    ]


def test_a_frozen_a_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rolora.*ffa-lora"):
        RoLora.check(RoLora.parse_options({}), AdapterConfig(kind="ffa-lora"))
