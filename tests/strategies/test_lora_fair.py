"""LoRA-FAIR against the dense ridge problem, and its cosine solver against automatic differentiation."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.errors import ConfigError, TooFewClientsError
from fedpeft.state import AdapterState, LoraFactors
from fedpeft.strategies.lora_fair import LoraFair
from fedpeft.strategies.means import weighted_mean
from tests.strategies.oracles import (
    LAYERS,
    Cohort,
    assert_close,
    cohorts,
    ideal,
    make,
    make_cohort,
    per_layer,
    permute_ranks,
    products,
    share_a,
)

SOLVERS: tuple[Literal["closed-form", "cosine"], ...] = ("closed-form", "cosine")


def fair(cohort: Cohort, regularization: float = 0.01, solver: str = "closed-form") -> AdapterState:
    strategy = make(LoraFair, regularization=regularization, solver=solver)
    return strategy.aggregate(iter(cohort.updates), cohort.current)


def drifting(seed: int = 0, drift: float = 0.5, r: int = 3) -> Cohort:
    """Return clients that left a common adapter in different directions, as in a federation."""
    cohort = make_cohort(seed, ranks=(r, r, r))
    centre = make_cohort(seed + 1, ranks=(r, r, r)).updates[0].factors
    updates = [
        replace(
            u,
            factors={
                n: replace(f, A=centre[n].A + drift * f.A, B=centre[n].B + drift * f.B) for n, f in u.factors.items()
            },
        )
        for u in cohort.updates
    ]
    return Cohort(updates, cohort.current)


def errors(cohort: Cohort, state: AdapterState) -> dict[str, float]:
    target = ideal(cohort.updates)
    return {layer: float((target[layer] - sent).norm()) for layer, sent in products(state).items()}


@settings(max_examples=40, deadline=None)
@given(cohorts(mixed=False), st.sampled_from([1e-3, 0.01, 0.5, 20.0]))
def test_the_closed_form_solves_the_dense_ridge_problem(cohort: Cohort, regularization: float) -> None:
    mean = weighted_mean(cohort.updates, cohort.current)
    merged = fair(cohort, regularization)
    for layer, target in ideal(cohort.updates).items():
        f = mean.factors[layer]
        gram = f.A @ f.A.T
        mu = regularization * gram.trace() / f.rank
        residual = target / f.scaling - f.B @ f.A
        system = gram + mu * torch.eye(f.rank, dtype=torch.float64)
        expected = f.B + torch.linalg.solve(system, residual @ f.A.T, left=False)
        torch.testing.assert_close(merged.factors[layer].B, expected, rtol=1e-8, atol=1e-9)
        assert torch.equal(merged.factors[layer].A, f.A)
    assert_close(merged.dense, mean.dense)


@settings(max_examples=40, deadline=None)
@given(cohorts(mixed=False), st.sampled_from([0.0, 1e-6, 0.01, 1.0, 1e3, 1e300]))
def test_no_layer_ends_further_from_the_ideal_update_than_with_fedit(cohort: Cohort, regularization: float) -> None:
    fedit = errors(cohort, weighted_mean(cohort.updates, cohort.current))
    for layer, error in errors(cohort, fair(cohort, regularization)).items():
        assert error <= fedit[layer] * (1 + 1e-12) + 1e-12


def test_less_regularization_comes_nearer() -> None:
    cohort = make_cohort()
    path = [sum(errors(cohort, fair(cohort, value)).values()) for value in (0.0, 0.01, 0.1, 1.0, 1e12)]
    assert path == sorted(path)
    assert path[0] < 0.99 * path[-1]


@settings(max_examples=20, deadline=None)
@given(cohorts(mixed=False))
def test_large_regularization_is_fedit(cohort: Cohort) -> None:
    assert_close(
        fair(cohort, 1e14).to_tensors(), weighted_mean(cohort.updates, cohort.current).to_tensors(), tolerance=1e-11
    )


@settings(max_examples=30, deadline=None)
@given(cohorts(mixed=False))
def test_without_regularization_the_residual_is_orthogonal_to_the_rows_of_abar(cohort: Cohort) -> None:
    merged = fair(cohort, 0.0)
    for layer, target in ideal(cohort.updates).items():
        f = merged.factors[layer]
        seen = (target - f.product()) @ f.A.T
        assert float(seen.norm()) <= 1e-9 * max(1.0, float(target.norm() * f.A.norm()))


@pytest.mark.parametrize("d_in", [7, 2])
@pytest.mark.parametrize("regularization", [0.0, 0.01])
def test_an_abar_that_lost_rank_is_tolerated(d_in: int, regularization: float) -> None:
    cohort = make_cohort(d_in=d_in)
    doubled = Cohort(
        [per_layer(u, lambda f: replace(f, A=f.A[[0, 0, 1]])) for u in cohort.updates], cohort.current
    )  # rank 2, in rows of 7 or of 2
    merged = fair(doubled, regularization)
    for layer, target in ideal(doubled.updates).items():
        f = merged.factors[layer]
        assert float(f.B.norm()) < 1e3
        if regularization == 0:
            assert float(((target - f.product()) @ f.A.T).norm()) < 1e-9


def test_clients_whose_a_vanishes_leave_the_mean_as_it_is() -> None:
    cohort = make_cohort()
    blank = Cohort(
        [per_layer(u, lambda f: replace(f, A=torch.zeros_like(f.A))) for u in cohort.updates], cohort.current
    )
    for solver in SOLVERS:
        merged = fair(blank, 0.0, solver)
        assert_close(merged.to_tensors(), weighted_mean(blank.updates, blank.current).to_tensors())


@settings(max_examples=15, deadline=None)
@given(cohorts(mixed=False), st.sampled_from([0.0, 0.01]))
def test_one_client_and_equal_clients_come_back_as_they_are(cohort: Cohort, regularization: float) -> None:
    client = cohort.updates[0]
    for solver in SOLVERS:
        for updates in ([client], [replace(client, num_examples=n) for n in (3, 8, 1)]):
            merged = fair(Cohort(updates, cohort.current), regularization, solver)
            assert_close(products(merged), ideal([client]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_order_of_clients_does_not_matter(solver: str) -> None:
    cohort = drifting()
    backwards = Cohort(cohort.updates[::-1], cohort.current)
    assert_close(fair(backwards, solver=solver).to_tensors(), fair(cohort, solver=solver).to_tensors(), tolerance=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_permuting_all_clients_ranks_alike_permutes_the_result(solver: str) -> None:
    cohort = drifting()
    alike = Cohort([per_layer(u, lambda f: permute_ranks(f, [2, 0, 1])) for u in cohort.updates], cohort.current)
    assert_close(products(fair(alike, solver=solver)), products(fair(cohort, solver=solver)), tolerance=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_client_with_thrice_the_rows_counts_as_three_clients(solver: str) -> None:
    cohort = make_cohort(rows=(6, 2, 2))
    first, *others = cohort.updates
    split = Cohort([replace(first, num_examples=2)] * 3 + others, cohort.current)
    assert_close(fair(split, solver=solver).to_tensors(), fair(cohort, solver=solver).to_tensors(), tolerance=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scalings_count_in_the_product_and_nowhere_else(solver: str) -> None:
    cohort = make_cohort(scalings=(2.0, 1.0, 4.0))
    on_one_scale = Cohort(
        [per_layer(u, lambda f: LoraFactors(f.A, f.B * f.scaling / 2.0, 2.0)) for u in cohort.updates], cohort.current
    )
    expected = fair(on_one_scale, solver=solver)
    assert_close(fair(cohort, solver=solver).to_tensors(), expected.to_tensors(), tolerance=1e-8)
    # the same clients, all of them and the output twice as strong: the same factors
    strong = Cohort(
        [per_layer(u, lambda f: replace(f, scaling=4.0)) for u in on_one_scale.updates],
        AdapterState({n: replace(f, scaling=4.0) for n, f in cohort.current.factors.items()}, cohort.current.dense),
    )
    assert_close(fair(strong, solver=solver).to_tensors(), expected.to_tensors(), tolerance=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_frozen_a_is_sent_back_bit_by_bit_and_the_mean_is_exact(solver: str) -> None:
    cohort = share_a(make_cohort(scalings=(2.0, 1.0, 4.0)))
    merged = make(LoraFair, frozen_a=True, solver=solver).aggregate(iter(cohort.updates), cohort.current)
    assert all(torch.equal(merged.factors[layer].A, f.A) for layer, f in cohort.current.factors.items())
    assert_close(products(merged), ideal(cohort.updates))


def cosine_objective(target: Tensor, f: LoraFactors, change: Tensor, regularization: float) -> Tensor:
    """The paper's objective, dense; the norm's gradient at 0 is left to the caller."""
    sent = (f.B + change) @ f.A
    cosine: Tensor = (target * sent).sum() / (target.norm() * sent.norm())
    penalty: Tensor = regularization * change.norm()
    return 1 - cosine + penalty


@pytest.mark.parametrize("regularization", [1e-4, 1e-3, 0.01])
@pytest.mark.parametrize("seed", range(4))
def test_the_cosine_solver_ends_where_the_dense_objective_is_stationary(seed: int, regularization: float) -> None:
    cohort = drifting(10 * seed, drift=1.0)
    mean = weighted_mean(cohort.updates, cohort.current)
    merged = fair(cohort, regularization, "cosine")
    moved = 0
    for layer, target in ideal(cohort.updates).items():
        f = mean.factors[layer]
        change = (merged.factors[layer].B - f.B).requires_grad_()
        stays = not change.detach().any()
        value = cosine_objective(target, f, change, 0.0 if stays else regularization)
        (gradient,) = torch.autograd.grad(value, change)
        start = cosine_objective(target, f, torch.zeros_like(f.B), regularization)
        if stays:
            assert float(gradient.norm()) <= regularization
        else:
            assert float(gradient.norm()) < 1e-6
            assert value.item() < start.item()
            moved += 1
    assert moved > 0 or regularization == 0.01


def test_without_penalty_the_cosine_reaches_that_of_the_projection() -> None:
    cohort = drifting(3, drift=1.0)
    merged, projected = fair(cohort, 0.0, "cosine"), fair(cohort, 0.0)
    for layer, target in ideal(cohort.updates).items():
        sent, best = merged.factors[layer].product(), projected.factors[layer].product()
        reached = float((target * sent).sum() / target.norm() / sent.norm())
        assert reached == pytest.approx(float((target * best).sum() / target.norm() / best.norm()), abs=1e-9)


def test_a_penalty_longer_than_the_gradient_keeps_the_mean_bit_by_bit() -> None:
    cohort = drifting()
    mean = weighted_mean(cohort.updates, cohort.current)
    merged = fair(cohort, 1e3, "cosine")
    assert all(torch.equal(merged.factors[layer].B, f.B) for layer, f in mean.factors.items())


@pytest.mark.parametrize("solver", SOLVERS)
def test_clients_that_learned_nothing_change_nothing(solver: str) -> None:
    cohort = make_cohort()
    idle = Cohort([per_layer(u, lambda f: replace(f, B=torch.zeros_like(f.B))) for u in cohort.updates], cohort.current)
    assert not any(f.B.any() for f in fair(idle, solver=solver).factors.values())


@pytest.mark.parametrize("solver", SOLVERS)
def test_clients_whose_b_cancel_give_a_finite_adapter(solver: str) -> None:
    cohort = make_cohort(rows=(4, 4), ranks=(3, 3), scalings=(1.0, 1.0))
    opposite = per_layer(cohort.updates[0], lambda f: replace(f, B=-f.B))
    updates = [cohort.updates[0], replace(opposite, factors={
        n: replace(f, A=cohort.updates[1].factors[n].A) for n, f in opposite.factors.items()
    })]  # fmt: skip
    merged = fair(Cohort(updates, cohort.current), solver=solver)
    assert all(torch.isfinite(tensor).all() for tensor in merged.to_tensors().values())


def test_results_have_the_type_of_the_adapter_and_are_contiguous() -> None:
    cohort = make_cohort()
    current = AdapterState.from_tensors({n: t.float() for n, t in cohort.current.to_tensors().items()}, 2.0)
    for solver in SOLVERS:
        for tensor in fair(Cohort(cohort.updates, current), solver=solver).to_tensors().values():
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), "much"])
def test_a_regularization_that_is_no_number_from_zero_up_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.regularization"):
        make(LoraFair, regularization=value)


def test_an_unknown_solver_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ConfigError, match="closed-form"):
        make(LoraFair, solver="sgd")


def test_an_empty_cohort_is_refused() -> None:
    with pytest.raises(TooFewClientsError):
        fair(Cohort([], make_cohort().current))


def test_every_client_counts_not_the_first_only() -> None:
    cohort = make_cohort()
    whole = products(fair(cohort))
    for k in range(3):
        without = products(fair(Cohort(cohort.updates[:k] + cohort.updates[k + 1 :], cohort.current)))
        assert all(not torch.allclose(whole[layer], without[layer]) for layer in LAYERS)
