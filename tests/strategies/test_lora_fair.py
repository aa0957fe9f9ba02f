"""LoRA-FAIR against the dense ridge problem, and its cosine solver against automatic differentiation."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.errors import ConfigError, TooFewClientsError
from fedpeft.strategies.algebra.factors import client_weights
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.lora_fair import CANCELLED, REGULARIZATION, LoraFair, own_sizes
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


def cancels(cohort: Cohort, mean: AdapterState) -> bool:
    """Tell whether the clients' A cancel in some direction of Abar, which by chance they rarely do."""
    weights = client_weights(cohort.updates)
    for layer, f in mean.factors.items():
        U, S, _ = torch.linalg.svd(f.A, full_matrices=False)
        if bool(torch.lt(S, CANCELLED * own_sizes([u.factors[layer] for u in cohort.updates], weights, U)).any()):
            return True
    return False


def errors(cohort: Cohort, state: AdapterState) -> dict[str, float]:
    target = ideal(cohort.updates)
    return {layer: float((target[layer] - sent).norm()) for layer, sent in products(state).items()}


@settings(max_examples=40, deadline=None)
@given(cohorts(mixed=False), st.sampled_from([1e-3, 0.01, 0.5, 20.0]))
def test_the_closed_form_solves_the_dense_ridge_problem(cohort: Cohort, regularization: float) -> None:
    mean = weighted_mean(cohort.updates, cohort.current)
    assume(not cancels(cohort, mean))
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
    assume(not cancels(cohort, weighted_mean(cohort.updates, cohort.current)))
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


def likeness(target: Tensor, sent: Tensor) -> Tensor:
    """Return the mean of the columns' cosines."""
    return ((target * sent).sum(dim=0) / target.norm(dim=0) / sent.norm(dim=0)).mean()


@pytest.mark.parametrize("regularization", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_cosine_solver_ends_where_the_dense_objective_is_stationary(seed: int, regularization: float) -> None:
    cohort = drifting(10 * seed, drift=1.0)
    mean = weighted_mean(cohort.updates, cohort.current)
    merged = fair(cohort, regularization, "cosine")

    def objective(layer: str, change: Tensor) -> Tensor:
        f, target = mean.factors[layer], ideal(cohort.updates)[layer]
        penalty = regularization * change.square().sum()
        return 1 - likeness(target, (f.B + change) @ f.A) + penalty

    for layer, f in mean.factors.items():
        change = (merged.factors[layer].B - f.B).requires_grad_()
        value = objective(layer, change)
        (gradient,) = torch.autograd.grad(value, change)
        assert float(gradient.norm()) < 1e-6
        assert value.item() < objective(layer, torch.zeros_like(f.B)).item()


def test_without_penalty_columns_are_more_alike_than_those_of_the_projection() -> None:
    cohort = drifting(3, drift=1.0)
    merged, projected = fair(cohort, 0.0, "cosine"), fair(cohort, 0.0)
    for layer, target in ideal(cohort.updates).items():
        reached, nearest = (likeness(target, state.factors[layer].product()) for state in (merged, projected))
        assert reached > nearest


def test_a_dear_penalty_keeps_the_mean() -> None:
    cohort = drifting()
    mean, merged = weighted_mean(cohort.updates, cohort.current), fair(cohort, 1e9, "cosine")
    assert_close(merged.to_tensors(), mean.to_tensors(), tolerance=1e-8)


def test_each_solver_has_a_lambda_of_its_own_unless_one_is_given() -> None:
    chosen = {solver: LoraFair.parse_options({"solver": solver}).regularization for solver in SOLVERS}
    assert chosen == REGULARIZATION
    assert LoraFair.parse_options({}).regularization == REGULARIZATION["closed-form"]
    given = LoraFair.parse_options({"solver": "cosine", "regularization": 0.25})
    assert LoraFair.parse_options(given.model_dump()) == given
    assert given.regularization == 0.25


def test_columns_that_are_zero_ask_for_nothing() -> None:
    cohort = drifting()

    def blanked(f: LoraFactors) -> LoraFactors:
        A = f.A.clone()
        A[:, 2] = 0
        return replace(f, A=A)

    blind = Cohort([per_layer(u, blanked) for u in cohort.updates], cohort.current)
    for layer, f in fair(blind, solver="cosine").factors.items():
        assert torch.isfinite(f.B).all()
        assert not torch.equal(f.B, weighted_mean(blind.updates, blind.current).factors[layer].B)


def opposite(noise: float, rows: tuple[int, int], dtype: torch.dtype = torch.float64) -> Cohort:
    """Return two clients that are alike up to a sign, and up to a little noise: Abar nearly vanishes."""
    cohort = make_cohort(rows=rows, ranks=(4, 4), scalings=(2.0, 2.0), d_in=24, d_out=17)
    own = make_cohort(5, rows=rows, ranks=(4, 4), scalings=(2.0, 2.0), d_in=24, d_out=17).updates[0].factors
    first = cohort.updates[0].factors
    turned = {n: replace(f, A=noise * own[n].A - f.A, B=noise * own[n].B - f.B) for n, f in first.items()}
    updates = [cohort.updates[0], replace(cohort.updates[1], factors=turned)]
    updates = [per_layer(u, lambda f: replace(f, A=f.A.to(dtype), B=f.B.to(dtype))) for u in updates]
    return Cohort(updates, cohort.current)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("noise", "rows"), [(0.0, (1000, 1001)), (1e-6, (5, 5)), (1e-3, (5, 5)), (1e-9, (7, 7))])
@pytest.mark.parametrize("solver", SOLVERS)
def test_b_stays_the_clients_own_size_where_abar_nearly_cancels(
    solver: str, noise: float, rows: tuple[int, int], dtype: torch.dtype
) -> None:
    cohort = opposite(noise, rows, dtype)
    for regularization in (0.0, 0.01):
        merged = fair(cohort, regularization, solver)
        for layer, f in merged.factors.items():
            largest = max(float(u.factors[layer].B.abs().max()) for u in cohort.updates)
            assert float(f.B.abs().max()) <= 2 * largest


def test_what_does_not_cancel_is_still_projected() -> None:
    """One rank of two clients cancels, the others do not: only that one is left to the mean."""
    cohort = make_cohort(rows=(3, 3), ranks=(3, 3), scalings=(2.0, 2.0), d_in=9, d_out=6)
    first = cohort.updates[0].factors
    turned = {
        n: replace(f, A=torch.cat([-first[n].A[:1] * (1 + 1e-7), f.A[1:]]))
        for n, f in cohort.updates[1].factors.items()
    }
    merged = fair(Cohort([cohort.updates[0], replace(cohort.updates[1], factors=turned)], cohort.current), 0.0)
    for layer, f in merged.factors.items():
        target = ideal([cohort.updates[0], replace(cohort.updates[1], factors=turned)])[layer]
        assert float(((target - f.product()) @ f.A[1:].T).norm()) < 1e-5 * float(target.norm())
        assert float(f.B.abs().max()) < 10 * float(first[layer].B.abs().max())


def test_ill_conditioned_clients_who_agree_are_no_cancellation() -> None:
    """What is small at every client is small in the mean too, and none of it is given up."""
    cohort = drifting()
    scale = torch.tensor([[1.0], [1e-3], [1e-5]], dtype=torch.float64)
    weak = Cohort([per_layer(u, lambda f: replace(f, A=scale * f.A)) for u in cohort.updates], cohort.current)
    merged = fair(weak, 0.0)
    for layer, target in ideal(weak.updates).items():
        f = merged.factors[layer]
        seen = (target - f.product()) @ torch.linalg.qr(f.A.T).Q
        assert float(seen.norm()) < 1e-9 * float(target.norm())


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
