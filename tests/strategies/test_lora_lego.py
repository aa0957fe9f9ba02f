"""LoRA-LEGO: what its products are, and what must not change them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.errors import AdapterError, ConfigError, TooFewClientsError
from fedpeft.strategies import lora_lego
from fedpeft.strategies.algebra import clustering
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.algebra.units import pool
from fedpeft.strategies.lora_lego import LoraLego, merge, merge_layers
from tests.strategies.oracles import (
    LAYERS,
    Cohort,
    assert_close,
    cohorts,
    dense_error,
    ideal,
    make,
    make_cohort,
    mean,
    per_layer,
    permuted,
    products,
    share_a,
)

Reweight = Literal["least-squares", "paper", "none"]
REWEIGHTS: tuple[Reweight, ...] = ("least-squares", "paper", "none")


def mixed_cohort(seed: int = 0) -> Cohort:
    return make_cohort(seed, (5, 1, 14), (3, 2, 4), (2.0, 1.0, 0.5), output_scaling=4.0, rank=3)


def lego(cohort: Cohort, rank: int | None = None, reweight: Reweight = "least-squares") -> AdapterState:
    return make(LoraLego, rank=rank, reweight=reweight).aggregate(iter(cohort.updates), cohort.current)


def total_rank(cohort: Cohort) -> int:
    return sum(u.factors[LAYERS[0]].rank for u in cohort.updates)


def planted(clients: int = 8, r: int = 5, noise: float = 0.05, seed: int = 0) -> Cohort:
    """Return noisy copies of one adapter, ranks permuted, signs flipped and lengths shifted in each."""
    generator = torch.Generator().manual_seed(seed)
    copies = make_cohort(seed + 1, [2 + k for k in range(clients)], [r] * clients, [2.0] * clients, 17, 23)
    centre = make_cohort(seed + 2, [1], [r], [2.0], 17, 23).updates[0].factors
    updates = []
    for u in copies.updates:
        order = torch.randperm(r, generator=generator)
        shift = torch.randn(r, generator=generator, dtype=torch.float64).exp()
        shift *= torch.where(torch.rand(r, generator=generator) < 0.5, -1.0, 1.0)
        factors = {
            n: LoraFactors(
                ((centre[n].A + noise * f.A) / shift[:, None])[order],
                ((centre[n].B + noise * f.B) * shift)[:, order],
                2.0,
            )
            for n, f in u.factors.items()
        }
        updates.append(replace(u, factors=factors))
    return Cohort(updates, copies.current)


# --- exact where it ought to be --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.integers(0, 3))
def test_with_as_many_ranks_as_all_clients_hold_least_squares_is_exact(cohort: Cohort, more: int) -> None:
    merged = lego(cohort, total_rank(cohort) + more)
    assert_close(products(merged), ideal(cohort.updates))
    assert all(f.rank == total_rank(cohort) + more for f in merged.factors.values())
    assert all(f.scaling == cohort.current.factors[layer].scaling for layer, f in merged.factors.items())


def test_ranks_too_alike_for_the_solve_to_tell_apart_do_not_spoil_exactness() -> None:
    cohort = make_cohort(rows=(1, 30), ranks=(2, 2), scalings=(2.0, 2.0))
    one, other = cohort.updates
    alike = {n: replace(f, A=f.A + 1e-5 * other.factors[n].A) for n, f in one.factors.items()}
    updates = [one, replace(other, factors=alike)]
    assert_close(products(lego(Cohort(updates, cohort.current), 4)), ideal(updates))


@settings(max_examples=20, deadline=None)
@given(cohorts(mixed=False), st.sampled_from(REWEIGHTS))
def test_one_client_and_equal_clients_come_back_as_they_are(cohort: Cohort, reweight: Reweight) -> None:
    client = cohort.updates[0]
    for updates in ([client], [replace(client, num_examples=n) for n in (3, 8, 1)]):
        merged = lego(Cohort(updates, cohort.current), reweight=reweight)
        assert_close(products(merged), ideal([client]))


def test_equal_clients_with_their_ranks_permuted_come_back_as_they_are() -> None:
    client = make_cohort().updates[0]
    updates = [permuted(client, order) for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2])]
    for reweight in REWEIGHTS:
        assert_close(products(lego(Cohort(updates, make_cohort().current), reweight=reweight)), ideal([client]))


@settings(max_examples=30, deadline=None)
@given(cohorts(), st.integers(1, 4))
def test_least_squares_leaves_a_residual_orthogonal_to_every_merged_rank(cohort: Cohort, rank: int) -> None:
    merged = lego(cohort, rank)
    for layer, target in ideal(cohort.updates).items():
        f = merged.factors[layer]
        residual = target - f.product()
        seen = torch.einsum("or,oi,ri->r", f.B, residual, f.A)
        scale = f.B.norm(dim=0) * f.A.norm(dim=1) * target.norm()
        assert bool((seen.abs() <= 1e-6 * scale + 1e-12).all())
        assert float(residual.norm()) <= float(target.norm()) * (1 + 1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 9])
def test_least_squares_is_the_nearest_of_the_three(rank: int) -> None:
    cohort = mixed_cohort()
    nearest, paper, none = (dense_error(cohort.updates, lego(cohort, rank, reweight)) for reweight in REWEIGHTS)
    assert nearest <= min(paper, none) + 1e-12


def test_ranks_that_clients_hold_in_another_order_sign_and_length_are_found_again() -> None:
    cohort = planted()
    for reweight in REWEIGHTS:
        assert dense_error(cohort.updates, lego(cohort, 5, reweight)) < 0.06
    assert dense_error(cohort.updates, weighted_mean(cohort.updates, cohort.current)) > 0.5


# --- what the other two reweightings are -----------------------------------------------------------------------------


def test_the_papers_reweighting_overshoots_by_the_root_of_the_number_of_equal_weights() -> None:
    cohort = make_cohort(rows=(4, 4, 4))
    expected = {layer: 3**0.5 * target for layer, target in ideal(cohort.updates).items()}
    assert_close(products(lego(cohort, 9, "paper")), expected)


def test_bare_centroids_ignore_weights_where_each_rank_is_its_own_cluster() -> None:
    cohort = mixed_cohort()
    expected = {layer: torch.stack([u.factors[layer].product() for u in cohort.updates]).sum(dim=0) for layer in LAYERS}
    assert_close(products(lego(cohort, 9, "none")), expected)


def test_the_papers_centroids_have_their_clusters_mean_norm() -> None:
    one, other = (torch.tensor(v, dtype=torch.float64) for v in ([[3.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]))
    b = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    clients = [
        ClientUpdate(str(k), n, {"l": LoraFactors(a, b, 1.0)}) for k, (n, a) in enumerate([(3, one), (1, other)])
    ]
    current = AdapterState({"l": LoraFactors(one, torch.zeros_like(b), 1.0)})
    # units with |a| = |b| as k-means sees them
    units = [
        torch.cat([a[0] * (b.norm() / a.norm()) ** 0.5, b[:, 0] * (a.norm() / b.norm()) ** 0.5]) for a in (one, other)
    ]
    centroid = 0.75 * units[0] + 0.25 * units[1]
    wanted = 0.75 * units[0].norm() + 0.25 * units[1].norm()
    for reweight, growth in (("none", torch.tensor(1.0)), ("paper", wanted / centroid.norm())):
        out = merge_layers(clients, current, 1, reweight)["l"].product()  # type: ignore[arg-type]
        expected = torch.outer(centroid[3:], centroid[:3]) * growth**2
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


# --- what must not change anything -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reweight", REWEIGHTS)
@pytest.mark.parametrize("rank", [2, 4, 9])
def test_neither_the_order_of_clients_nor_of_one_clients_ranks_matters(rank: int, reweight: Reweight) -> None:
    cohort = mixed_cohort(rank)
    expected = products(lego(cohort, rank, reweight))
    for updates in itertools.islice(itertools.permutations(cohort.updates), 1, None):
        assert_close(products(lego(Cohort(list(updates), cohort.current), rank, reweight)), expected)
    for order in ([3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]):
        last = permuted(cohort.updates[2], order)
        moved = Cohort([*cohort.updates[:2], last], cohort.current)
        assert_close(products(lego(moved, rank, reweight)), expected)


@settings(max_examples=25, deadline=None)
@given(cohorts(), st.integers(1, 4), st.sampled_from(REWEIGHTS), st.integers(0, 2**20))
def test_how_a_client_splits_a_rank_between_a_and_b_does_not_matter(
    cohort: Cohort, rank: int, reweight: Reweight, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def regauge(f: LoraFactors) -> LoraFactors:
        c = (4 * torch.randn(f.rank, generator=generator, dtype=torch.float64)).exp()
        c = c * torch.where(torch.rand(f.rank, generator=generator) < 0.5, -1.0, 1.0)
        return replace(f, A=f.A / c[:, None], B=f.B * c)

    same = Cohort([per_layer(u, regauge) for u in cohort.updates], cohort.current)
    assert_close(products(lego(same, rank, reweight)), products(lego(cohort, rank, reweight)), tolerance=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_equally_good_starts_are_chosen_by_what_units_are_and_by_nothing_else(seed: int) -> None:
    cohort = make_cohort(seed, [5] * 6, [4] * 6, [1.0] * 6, 3, 4)
    # units of one length and few directions, whose clusterings often tie
    level = Cohort(
        [per_layer(u, lambda f: replace(f, A=f.A.sign(), B=f.B.sign())) for u in cohort.updates], cohort.current
    )
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    for each in (cohort, level):
        moved = [
            per_layer(permuted(u, [2, 0, 3, 1]), lambda f: replace(f, A=f.A * flips[:, None], B=f.B * flips))
            for u in (each.updates[k] for k in (3, 0, 5, 1, 4, 2))
        ]
        assert_close(products(lego(Cohort(moved, each.current), 5)), products(lego(each, 5)))


def test_scalings_count_in_the_product_and_nowhere_else() -> None:
    cohort = mixed_cohort()
    unit = Cohort(
        [per_layer(u, lambda f: LoraFactors(f.A, f.B * f.scaling, 1.0)) for u in cohort.updates],
        AdapterState({n: replace(f, scaling=1.0) for n, f in cohort.current.factors.items()}, cohort.current.dense),
    )
    for reweight in REWEIGHTS:
        assert_close(products(lego(cohort, 4, reweight)), products(lego(unit, 4, reweight)))


def test_a_client_with_thrice_the_rows_counts_as_three_clients() -> None:
    cohort = make_cohort(rows=(6, 2, 2))
    first, *others = cohort.updates
    split = Cohort([replace(first, num_examples=2)] * 3 + others, cohort.current)
    assert_close(products(lego(split, 4)), products(lego(cohort, 4)))


def test_every_client_counts_not_the_first_only() -> None:
    cohort = make_cohort()
    whole = products(lego(cohort))
    for k in range(3):
        without = products(lego(Cohort(cohort.updates[:k] + cohort.updates[k + 1 :], cohort.current)))
        assert all(not torch.allclose(whole[layer], without[layer]) for layer in LAYERS)


@pytest.mark.parametrize("rank", [2, 4, 12])
def test_ranks_with_b_zero_say_nothing(rank: int) -> None:
    cohort = mixed_cohort()

    def with_idle_ranks(f: LoraFactors) -> LoraFactors:
        idle = torch.zeros(f.B.shape[0], 2, dtype=torch.float64)
        return replace(f, A=torch.cat([f.A, 5 * f.A[:2]]), B=torch.cat([f.B, idle], dim=1))

    wider = Cohort([per_layer(u, with_idle_ranks) for u in cohort.updates], cohort.current)
    assert_close(products(lego(wider, rank)), products(lego(cohort, rank)))


def test_layers_clustered_together_come_out_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = make_cohort(rows=(3, 5, 2, 7), ranks=(3, 3, 3, 3), scalings=(1.0, 2.0, 1.0, 1.0))
    # one layer has fewer live ranks than the other, which pads the batch
    first = cohort.updates[0]
    part = replace(first.factors[LAYERS[0]], B=first.factors[LAYERS[0]].B * torch.tensor([0.0, 1.0, 1.0]))
    cohort.updates[0] = replace(first, factors={**first.factors, LAYERS[0]: part})
    together = lego(cohort).to_tensors()
    calls: list[int] = []
    original = clustering.axial_kmeans

    def counted(gram: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
        calls.append(len(gram))
        return original(gram, weights, k)

    monkeypatch.setattr(lora_lego, "axial_kmeans", counted)
    lego(cohort)
    monkeypatch.setattr(lora_lego, "BATCH_BYTES", 1)
    assert_close(lego(cohort).to_tensors(), together)
    assert calls == [2, 1, 1]


# --- the first rounds of a federation --------------------------------------------------------------------------------


def test_a_shared_a_far_longer_than_b_does_not_decide_the_clusters() -> None:
    # two nearly equal rows of A; the clients learned the same two columns of B, in opposite order
    base = torch.linspace(-1, 1, 9, dtype=torch.float64)
    A0 = torch.stack([base, base + 0.02 * torch.cos(5 * base)]) * 10
    u, v = torch.eye(6, dtype=torch.float64)[:2] * 1e-3
    clients = [
        ClientUpdate(str(k), 10, {"l": LoraFactors(A0, torch.stack(columns, dim=1), 2.0)})
        for k, columns in enumerate([(u, v), (v, u)])
    ]
    current = AdapterState({"l": LoraFactors(A0, torch.zeros(6, 2, dtype=torch.float64), 2.0)})
    merged = AdapterState(merge_layers(clients, current))
    assert dense_error(clients, merged) < 1e-3
    columns = merged.factors["l"].B / merged.factors["l"].B.norm(dim=0)
    # grouped by index, both columns would be u + v
    assert float(columns.abs().amax(dim=0).min()) > 0.999


def test_where_no_client_learned_anything_ranks_remain_that_can_be_trained() -> None:
    cohort = make_cohort()
    idle = Cohort([per_layer(u, lambda f: replace(f, B=torch.zeros_like(f.B))) for u in cohort.updates], cohort.current)
    for reweight, rank in itertools.product(REWEIGHTS, (1, 3, 7)):
        merged = lego(idle, rank, reweight)
        for layer, f in merged.factors.items():
            assert not f.B.any()
            typical = cohort.current.factors[layer].A.norm(dim=1).mean()
            torch.testing.assert_close(f.A.norm(dim=1), typical.expand(rank))
            assert int(torch.linalg.matrix_rank(f.A)) == rank


def test_ranks_without_a_cluster_have_b_zero_and_an_a_that_can_be_trained() -> None:
    cohort = mixed_cohort()
    for layer, f in lego(cohort, 12).factors.items():
        padded = ~f.B.any(dim=0)
        assert int(padded.sum()) == 3
        typical = cohort.current.factors[layer].A.norm(dim=1).mean()
        torch.testing.assert_close(f.A[padded].norm(dim=1), typical.expand(3))


def test_a_keeps_the_length_that_clients_gave_it_and_b_takes_the_rest() -> None:
    client = per_layer(
        make_cohort(rows=(5,), ranks=(3,), scalings=(2.0,)).updates[0], lambda f: replace(f, B=f.B * 1e-4)
    )
    for layer, f in lego(Cohort([client], make_cohort().current)).factors.items():
        sent = client.factors[layer]
        torch.testing.assert_close(f.A.norm(dim=1).sort().values, sent.A.norm(dim=1).sort().values)
        torch.testing.assert_close(f.B.norm(dim=0).sort().values, sent.B.norm(dim=0).sort().values)


def test_opposite_clients_cancel_into_a_finite_adapter() -> None:
    client = make_cohort().updates[0]
    opposite = per_layer(client, lambda f: replace(f, B=-f.B))
    for reweight in REWEIGHTS:
        merged = lego(Cohort([client, opposite], make_cohort().current), reweight=reweight)
        assert all(torch.isfinite(tensor).all() for tensor in merged.to_tensors().values())
    nothing = lego(Cohort([client, opposite], make_cohort().current), 6)
    assert all(float(f.product().abs().max()) < 1e-12 for f in nothing.factors.values())


# --- a frozen, shared A ----------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(cohorts(mixed=False), st.sampled_from(REWEIGHTS))
def test_a_frozen_a_is_sent_back_bit_by_bit(cohort: Cohort, reweight: Reweight) -> None:
    cohort = share_a(cohort)
    merged = make(LoraLego, frozen_a=True, reweight=reweight).aggregate(iter(cohort.updates), cohort.current)
    assert all(torch.equal(merged.factors[layer].A, f.A) for layer, f in cohort.current.factors.items())
    if reweight == "paper":
        for layer, f in merged.factors.items():
            norms = [u.factors[layer].scaling * u.factors[layer].B.norm(dim=0) for u in cohort.updates]
            torch.testing.assert_close(f.scaling * f.B.norm(dim=0), mean(norms, cohort.updates))
        directions = weighted_mean(cohort.updates, cohort.current, trains_a=False)
        for layer, f in merged.factors.items():
            cosine = torch.cosine_similarity(f.B, directions.factors[layer].B, dim=0)
            torch.testing.assert_close(cosine, torch.ones_like(cosine))
    else:
        assert_close(products(merged), ideal(cohort.updates))


def test_a_frozen_a_refuses_another_rank() -> None:
    cohort = share_a(make_cohort())
    with pytest.raises(ConfigError, match=r"strategy\.rank = 4.*keeps its rank 3"):
        make(LoraLego, frozen_a=True, rank=4).aggregate(cohort.updates, cohort.current)
    make(LoraLego, frozen_a=True, rank=3).aggregate(cohort.updates, cohort.current)


# --- form ------------------------------------------------------------------------------------------------------------


def test_the_head_is_the_weighted_mean_as_in_every_method() -> None:
    cohort = mixed_cohort()
    expected = mean([u.dense["classifier.weight"] for u in cohort.updates], cohort.updates)
    torch.testing.assert_close(lego(cohort).dense["classifier.weight"], expected)


def test_results_have_the_type_of_the_adapter_and_are_contiguous_and_repeatable() -> None:
    cohort = mixed_cohort()
    current = AdapterState.from_tensors({n: t.float() for n, t in cohort.current.to_tensors().items()}, 4.0)
    one, other = (lego(Cohort(cohort.updates, current), 5).to_tensors() for _ in range(2))
    for name, tensor in one.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, other[name])


def test_uploads_in_float32_are_merged_as_in_float64_but_for_rounding() -> None:
    cohort = planted()
    current = AdapterState.from_tensors({n: t.float() for n, t in cohort.current.to_tensors().items()}, 2.0)
    single = [per_layer(u, lambda f: replace(f, A=f.A.float(), B=f.B.float())) for u in cohort.updates]
    double = [per_layer(u, lambda f: replace(f, A=f.A.double(), B=f.B.double())) for u in single]
    for rank in (3, 5, 40):
        merged = merge_layers(single, current, rank)
        expected = products(AdapterState(merge_layers(double, cohort.current, rank)))
        assert_close({n: f.product().double() for n, f in merged.items()}, expected, tolerance=1e-5)
        again = merge_layers([permuted(u, [4, 2, 0, 3, 1]) for u in single[::-1]], current, rank)
        assert all(torch.equal(again[n].A, f.A) and torch.equal(again[n].B, f.B) for n, f in merged.items())


def test_the_rank_is_the_adapters_unless_another_one_is_asked_for() -> None:
    cohort = mixed_cohort()
    assert {f.rank for f in lego(cohort).factors.values()} == {3}
    assert {f.rank for f in lego(cohort, 2).factors.values()} == {2}


def test_bad_options_and_cohorts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.rank = 0"):
        make(LoraLego, rank=0)
    with pytest.raises(ConfigError, match="least-squares"):
        make(LoraLego, reweight="paper-like")
    with pytest.raises(TooFewClientsError):
        lego(Cohort([], make_cohort().current))
    cohort = make_cohort()
    stranger = replace(cohort.updates[0], factors={"other": cohort.updates[0].factors[LAYERS[0]]})
    with pytest.raises(AdapterError, match="client '0'"):
        lego(Cohort([stranger], cohort.current))


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-7])
def test_clusters_that_are_nearly_one_direction_do_not_cancel_each_other_at_great_length(noise: float) -> None:
    """Solved to the last digit, two centroids that differ by noise would get huge lengths of opposite signs."""
    cohort = make_cohort(rows=(1, 1), ranks=(2, 2), scalings=(1.0, 1.0), d_in=9, d_out=13)
    own = cohort.updates[0].factors[LAYERS[0]]
    factors = []
    for update in cohort.updates:
        f = update.factors[LAYERS[0]]  # all four units are one, and a little noise
        factors.append(LoraFactors(own.A[[0, 0]] + noise * f.A, own.B[:, [0, 0]] + noise * f.B, 1.0))
    units = pool(factors, [0.5, 0.5])
    labels, signs = torch.tensor([0, 1, 0, 1]), torch.ones(4)
    A, B = merge(units, labels, signs, torch.zeros(2, 9, dtype=torch.float64), "least-squares")
    assert float(B.abs().max()) <= 10 * float(own.B.abs().max())
    target = sum(0.5 * f.product() for f in factors)
    assert isinstance(target, torch.Tensor)
    assert float((B @ A - target).norm()) <= 3 * noise * float(target.norm())
