"""FedRot-LoRA: rotations against the Procrustes problem that they solve, and the means of what they rotate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.fedrot_lora import (
    Aligned,
    FedRotLora,
    align,
    aligned_factor,
    nearest_orthogonal,
    rotate,
    rotation,
)
from tests.strategies.oracles import (
    LAYERS,
    Cohort,
    assert_close,
    cohorts,
    dense_error,
    ideal,
    make,
    make_cohort,
    permute_ranks,
    permuted,
    products,
    share_a,
)

FACTORS: tuple[Aligned, ...] = ("A", "B")
LAMBDAS = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])


def fedrot(cohort: Cohort, rotate_lambda: float = 0.5, server_round: int = 2) -> AdapterState:
    strategy = make(FedRotLora, rotate_lambda=rotate_lambda)
    return strategy.aggregate(iter(cohort.updates), cohort.current, server_round)


def under_way(cohort: Cohort) -> Cohort:
    """Give the adapter that the clients started from a B, as it has after a round."""
    factors = {}
    for number, (layer, f) in enumerate(cohort.current.factors.items()):
        generator = torch.Generator().manual_seed(number)
        factors[layer] = replace(f, B=torch.randn(f.B.shape, generator=generator, dtype=torch.float64))
    return Cohort(cohort.updates, replace(cohort.current, factors=factors))


def orthogonal(r: int, seed: int, proper: bool = True, angle: float = 1.0) -> Tensor:
    """Return exp(angle J), J antisymmetric and random of spectral norm 1; mirrored unless `proper`."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(r, r, generator=generator, dtype=torch.float64)
    J = J - J.T
    R: Tensor = torch.linalg.matrix_exp(angle * J / max(float(torch.linalg.matrix_norm(J, 2)), 1e-300))
    if not proper:
        R[:, 0] *= -1
    return R


def turned(proper: bool = True, angle: float = 1.0, shared: bool = True) -> Cohort:
    """Return clients that left one adapter, are equal as products, and differ by orthogonal matrices."""
    cohort = under_way(make_cohort(ranks=(4, 4, 4), scalings=(2.0, 2.0, 2.0)))
    centre = cohort.current.factors if shared else cohort.updates[0].factors
    updates = []
    for k, update in enumerate(cohort.updates):
        rotated = {layer: rotate(f, orthogonal(4, k, proper or k == 0, angle)) for layer, f in centre.items()}
        updates.append(replace(update, factors=rotated))
    return Cohort(updates, cohort.current)


def test_rounds_take_turns_and_the_first_rotates_nothing() -> None:
    assert [aligned_factor(t) for t in range(1, 6)] == [None, "A", "B", "A", "B"]
    cohort = under_way(make_cohort())
    first = fedrot(cohort, server_round=1).to_tensors()
    fedit = weighted_mean(cohort.updates, cohort.current).to_tensors()
    assert all(torch.equal(first[name], fedit[name]) for name in fedit)
    for server_round, aligned in ((2, FACTORS[0]), (3, FACTORS[1])):
        updates = [align(u, cohort.current, aligned, 0.5) for u in cohort.updates]
        expected = weighted_mean(updates, cohort.current).to_tensors()
        assert_close(fedrot(cohort, server_round=server_round).to_tensors(), expected)
        assert not torch.allclose(expected[f"{LAYERS[0]}.lora_A.weight"], first[f"{LAYERS[0]}.lora_A.weight"])


@settings(max_examples=60, deadline=None)
@given(cohorts(mixed=False), st.sampled_from(FACTORS), LAMBDAS)
def test_rotations_are_orthogonal_and_leave_each_clients_product_as_it_is(
    drawn: Cohort, aligned: Aligned, rotate_lambda: float
) -> None:
    cohort = under_way(drawn)
    for update in cohort.updates:
        for layer, f in update.factors.items():
            R = rotation(f, cohort.current.factors[layer], aligned, rotate_lambda)
            assert_close({"RtR": R.T @ R}, {"RtR": torch.eye(f.rank, dtype=torch.float64)})
            if rotate_lambda < 1:
                assert float(torch.linalg.det(R)) > 0.99
        assert_close(ideal([align(update, cohort.current, aligned, rotate_lambda)]), ideal([update]))


@settings(max_examples=40, deadline=None)
@given(cohorts(mixed=False), st.sampled_from(FACTORS), st.integers(0, 2**20), st.booleans())
def test_the_full_rotation_solves_procrustes(drawn: Cohort, aligned: Aligned, seed: int, proper: bool) -> None:
    cohort = under_way(drawn)
    for layer, f in cohort.updates[0].factors.items():
        reference = cohort.current.factors[layer]

        def distance(R: Tensor, f: LoraFactors = f, reference: LoraFactors = reference) -> float:
            rotated = rotate(f, R)
            return float((rotated.A - reference.A).norm() if aligned == "A" else (rotated.B - reference.B).norm())

        best = distance(rotation(f, reference, aligned, 1.0))
        assert best <= distance(orthogonal(f.rank, seed, proper, angle=3.0)) * (1 + 1e-12)


def test_half_the_weight_is_half_the_angle() -> None:
    """In a plane, I and a turn by t average to a turn by t / 2, once projected back to a rotation."""
    f = make_cohort(ranks=(2, 2, 2)).updates[0].factors[LAYERS[0]]
    for angle in (0.3, 1.0, 3.0):
        turn = orthogonal(2, 0, angle=angle)
        for aligned in FACTORS:
            R = rotation(rotate(f, turn), f, aligned, 0.5)
            assert_close({"R": R}, {"R": orthogonal(2, 0, angle=angle / 2).T})
            assert_close({"R": rotation(rotate(f, turn), f, aligned, 1.0)}, {"R": turn.T})
        reference = LoraFactors(torch.eye(2, 3, dtype=torch.float64), f.B, 1.0)  # of which M is a mirror image, turned
        mirrored = replace(reference, A=(turn * torch.tensor([1.0, -0.5])) @ reference.A)
        assert_close({"R": rotation(mirrored, reference, "A", 0.5)}, {"R": orthogonal(2, 0, angle=angle / 2)})


def test_what_a_reference_does_not_determine_stays_where_it_is() -> None:
    cohort = make_cohort()
    f = cohort.updates[0].factors[LAYERS[0]]
    reference = cohort.current.factors[LAYERS[0]]  # B = 0
    identity = torch.eye(3, dtype=torch.float64)
    for rotate_lambda in (0.5, 1.0):
        assert_close({"R": rotation(f, reference, "B", rotate_lambda)}, {"R": identity})
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    assert_close({"R": nearest_orthogonal((half_turn + identity) / 2, proper=True)}, {"R": identity})
    vv = torch.full((3, 3), 1 / 3, dtype=torch.float64)  # a projection on one direction, to be reversed
    assert_close({"R": nearest_orthogonal(-2 * vv, proper=False)}, {"R": identity - 2 * vv})


def test_the_nearest_rotation_gives_up_what_costs_least() -> None:
    M = torch.diag(torch.tensor([3.0, -0.5, 2.0], dtype=torch.float64))
    assert_close({"R": nearest_orthogonal(M, proper=True)}, {"R": torch.eye(3, dtype=torch.float64)})
    assert_close({"R": nearest_orthogonal(M, proper=False)}, {"R": M.sign()})


@pytest.mark.parametrize("server_round", [2, 3])
@pytest.mark.parametrize("proper", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_clients_that_are_rotations_of_each_other_merge_exactly(server_round: int, proper: bool, shared: bool) -> None:
    cohort = turned(proper, shared=shared)
    assert dense_error(cohort.updates, fedrot(cohort, 1.0, server_round)) < 1e-12
    assert dense_error(cohort.updates, weighted_mean(cohort.updates, cohort.current)) > 0.05


@pytest.mark.parametrize("server_round", [2, 3])
@pytest.mark.parametrize("angle", [0.2, 1.0, 2.0])
def test_the_error_falls_from_fedits_as_lambda_grows(server_round: int, angle: float) -> None:
    cohort = turned(angle=angle)
    fedit = dense_error(cohort.updates, weighted_mean(cohort.updates, cohort.current))
    errors = [dense_error(cohort.updates, fedrot(cohort, value, server_round)) for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert math.isclose(errors[0], fedit, rel_tol=1e-10)
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 * fedit
    assert errors[4] < 1e-12


@settings(max_examples=20, deadline=None)
@given(cohorts(mixed=False), LAMBDAS, st.sampled_from([1, 2, 3]))
def test_one_client_and_equal_clients_come_back_as_they_are(
    drawn: Cohort, rotate_lambda: float, server_round: int
) -> None:
    cohort = under_way(drawn)
    client = cohort.updates[0]
    for updates in ([client], [replace(client, num_examples=n) for n in (3, 8, 1)]):
        merged = fedrot(Cohort(updates, cohort.current), rotate_lambda, server_round)
        assert_close(products(merged), ideal([client]))


@pytest.mark.parametrize("server_round", [2, 3])
def test_the_order_of_clients_and_of_all_ranks_alike_changes_nothing(server_round: int) -> None:
    cohort = under_way(make_cohort(scalings=(1.0, 2.0, 3.0)))
    expected = products(fedrot(cohort, server_round=server_round))
    reverse = Cohort(cohort.updates[::-1], cohort.current)
    assert_close(products(fedrot(reverse, server_round=server_round)), expected)
    order = (1, 0, 2)  # a reflection
    current = {layer: permute_ranks(f, order) for layer, f in cohort.current.factors.items()}
    alike = Cohort([permuted(u, order) for u in cohort.updates], replace(cohort.current, factors=current))
    assert_close(products(fedrot(alike, server_round=server_round)), expected)
    one = Cohort([permuted(cohort.updates[0], order), *cohort.updates[1:]], cohort.current)
    assert any(not torch.allclose(p, expected[n]) for n, p in products(fedrot(one, 0.5, server_round)).items())
    # unless clients are aligned in full, by reflections too
    assert_close(products(fedrot(one, 1.0, server_round)), products(fedrot(cohort, 1.0, server_round)))


@pytest.mark.parametrize("server_round", [2, 3])
def test_regression_alpha_over_r_is_not_left_out(server_round: int) -> None:
    """Clients of other scalings but equal products are the same clients."""
    cohort = turned()
    other = [
        replace(u, factors={n: replace(f, scaling=0.5 * k, B=f.B * 4 / k) for n, f in u.factors.items()})
        for k, u in enumerate(cohort.updates, start=1)
    ]
    expected = fedrot(cohort, server_round=server_round).to_tensors()
    assert_close(fedrot(Cohort(other, cohort.current), server_round=server_round).to_tensors(), expected)


@pytest.mark.parametrize("server_round", [2, 3])
def test_regression_means_are_weighted_with_rows(server_round: int) -> None:
    cohort = under_way(make_cohort(rows=(6, 2, 2)))
    first, *others = cohort.updates
    split = Cohort([replace(first, num_examples=2)] * 3 + others, cohort.current)
    expected = fedrot(cohort, server_round=server_round).to_tensors()
    assert_close(fedrot(split, server_round=server_round).to_tensors(), expected)
    even = Cohort([replace(u, num_examples=1) for u in cohort.updates], cohort.current)
    assert all(not torch.allclose(t, expected[n]) for n, t in fedrot(even, 0.5, server_round).to_tensors().items())


@pytest.mark.parametrize("server_round", [1, 2, 3])
def test_a_frozen_a_is_not_rotated(server_round: int) -> None:
    frozen = share_a(under_way(make_cohort()))
    strategy = make(FedRotLora, frozen_a=True, rotate_lambda=1.0)
    merged = strategy.aggregate(iter(frozen.updates), frozen.current, server_round).to_tensors()
    expected = weighted_mean(frozen.updates, frozen.current, trains_a=False)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.to_tensors().items())
    assert_close(products(expected), ideal(frozen.updates))


def test_clients_are_rotated_in_full_unless_an_option_says_less() -> None:
    cohort = turned()
    merged = make(FedRotLora).aggregate(iter(cohort.updates), cohort.current, 2)
    assert dense_error(cohort.updates, merged) < 1e-12 < dense_error(cohort.updates, fedrot(cohort, 0.5))


@pytest.mark.parametrize("noise", [0.0, 1e-12])
def test_a_client_that_shares_nothing_with_the_reference_stays_as_it_is(noise: float) -> None:
    """Where A_k A^T is what rounding leaves, it determines no rotation."""
    rows = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q.T
    f, reference = (LoraFactors(part, torch.ones(4, 3).double(), 1.0) for part in (rows[:3], rows[3:]))
    nearly = replace(reference, A=reference.A + noise * torch.randn(3, 9, generator=torch.Generator().manual_seed(2)))
    assert_close({"R": rotation(f, nearly, "A", 1.0)}, {"R": torch.eye(3, dtype=torch.float64)})


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ConfigError, match="rotate_lambda"):
        make(FedRotLora, rotate_lambda=1.5)
    cohort = make_cohort(ranks=(2, 2, 2), rank=3)
    with pytest.raises(AdapterError, match="rotations need equal ranks"):
        fedrot(cohort)
    first = cohort.updates[0]
    with pytest.raises(AdapterError, match="same layers"):
        fedrot(Cohort([replace(first, factors={LAYERS[0]: first.factors[LAYERS[0]]})], cohort.current))
