"""Changes of the base: sums that lose nothing, the smaller of two forms, and weights that come back as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpeft.adapters.base_change import BaseWeights, dense, matrix
from fedpeft.adapters.state import AdapterState, BaseChange, LoraFactors
from fedpeft.strategies.algebra.base_changes import add, advance, as_step, exact_sum, step_floats


def piece(seed: int, rank: int, d_in: int = 9, d_out: int = 13) -> LoraFactors:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=draw, dtype=torch.float64)
    return LoraFactors(A, torch.randn(d_out, rank, generator=draw, dtype=torch.float64), 1.0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 99))
def test_steps_add_up_to_their_dense_sum(ranks: list[int], seed: int) -> None:
    base: dict[str, BaseChange] = {}
    total = torch.zeros(13, 9, dtype=torch.float64)
    for number, rank in enumerate(ranks):
        step = piece(seed + number, rank)
        base = advance(base, {"layer": as_step(step.B, step.A, like=step.A)})
        total += step.product()
    torch.testing.assert_close(dense(base["layer"]), total, rtol=1e-10, atol=1e-10)


def test_a_change_is_held_as_factors_until_a_matrix_is_smaller() -> None:
    # 9 * 13 = 117 numbers, and 22 a rank: six ranks are more
    assert step_floats(5, 9, 13) == 110
    assert step_floats(6, 9, 13) == 117
    held = add(piece(0, 2), piece(1, 3))
    assert isinstance(held, LoraFactors)
    assert held.rank == 5
    assert isinstance(add(held, piece(2, 1)), Tensor)


def test_a_direction_that_recurs_takes_no_more_room() -> None:
    one = piece(0, 2)
    held = add(one, LoraFactors(one.A, 3 * one.B, 1.0))
    assert isinstance(held, LoraFactors)
    assert held.rank == 2
    torch.testing.assert_close(held.product(), 4 * one.product(), rtol=1e-12, atol=1e-12)


def test_the_last_step_stays_apart_from_the_earlier_ones() -> None:
    steps = [piece(number, 1) for number in range(3)]
    base: dict[str, BaseChange] = {}
    for step in steps:
        base = advance(base, {"layer": step})
    earlier = base["layer"].earlier
    assert base["layer"].last is steps[2]
    assert earlier is not None
    torch.testing.assert_close(matrix(earlier), steps[0].product() + steps[1].product())


@pytest.mark.parametrize("rank", [2, 8])  # as factors, and as a matrix
def test_adapter_and_changed_base_are_one_adapter(rank: int) -> None:
    f = LoraFactors(piece(5, 2).A, piece(5, 2).B, 0.5)
    base = advance(advance({}, {"layer": piece(6, 1)}), {"layer": as_step(piece(7, rank).B, piece(7, rank).A, f.A)})
    state = AdapterState({"layer": f}, {"head": torch.ones(2)}, base)
    alone = exact_sum(AdapterState.from_tensors(state.to_tensors(), 0.5))
    assert not alone.base
    expected = f.product() + dense(base["layer"])
    torch.testing.assert_close(alone.factors["layer"].product(), expected, rtol=1e-10, atol=1e-10)
    assert alone.factors["layer"].rank == min(3 + rank, 9)


def test_states_survive_the_wire_with_their_base() -> None:
    state = AdapterState(
        {"layer": piece(0, 2), "other": piece(1, 2)},
        {},
        {"layer": BaseChange(torch.ones(13, 9), piece(2, 1)), "other": BaseChange(None, torch.ones(13, 9))},
    )
    again = AdapterState.from_tensors(state.to_tensors(), 1.0)
    assert again.to_tensors().keys() == state.to_tensors().keys()
    assert again.base["other"].earlier is None


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_original_plus_change_and_come_back_bit_by_bit(transposed: bool) -> None:
    original = torch.randn((9, 13) if transposed else (13, 9), generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(original.clone())
    weights = BaseWeights({"layer": weight}, frozenset({"layer"} if transposed else ()))
    for number in range(20):  # merging and unmerging would leave rounding behind
        change = BaseChange(piece(number, 3), piece(number + 50, 2))
        weights.set({"layer": change})
        moved = dense(change).T if transposed else dense(change)
        assert torch.equal(weight.data, (original.double() + moved).float())
    weights.set({})
    assert torch.equal(weight.data, original)


def test_the_same_change_again_is_not_computed_again() -> None:
    weight = nn.Parameter(torch.zeros(13, 9))
    weights = BaseWeights({"layer": weight})
    weights.set({"layer": BaseChange(None, piece(0, 1))})
    weight.data.zero_()
    weights.set({"layer": BaseChange(None, piece(0, 1))})  # equal, though another object
    assert not weight.data.any()
    weights.set({"layer": BaseChange(None, piece(1, 1))})
    assert weight.data.any()
