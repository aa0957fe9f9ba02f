"""FedIT against dense weighted means, and as a stream."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.errors import AdapterError, TooFewClientsError
from fedpeft.strategies.algebra.means import mean_dense, weighted_mean
from fedpeft.strategies.fedit import FedIt
from tests.strategies.oracles import (
    Cohort,
    assert_close,
    cohorts,
    dense_error,
    ideal,
    make,
    make_cohort,
    mean,
    per_layer,
    permute_ranks,
    products,
    share_a,
)


@settings(max_examples=30, deadline=None)
@given(cohorts(mixed=False))
def test_a_and_b_are_the_weighted_means_on_the_scale_of_the_adapter(cohort: Cohort) -> None:
    merged = make(FedIt).aggregate(iter(cohort.updates), cohort.current)
    expected = {}
    for layer, f in cohort.current.factors.items():
        expected[f"{layer}.lora_A.weight"] = mean([u.factors[layer].A for u in cohort.updates], cohort.updates)
        scaled = [u.factors[layer].scaling / f.scaling * u.factors[layer].B for u in cohort.updates]
        expected[f"{layer}.lora_B.weight"] = mean(scaled, cohort.updates)
        assert merged.factors[layer].scaling == f.scaling
    expected["classifier.weight"] = mean([u.dense["classifier.weight"] for u in cohort.updates], cohort.updates)
    assert_close(merged.to_tensors(), expected)


@settings(max_examples=15, deadline=None)
@given(cohorts(mixed=False))
def test_one_client_and_equal_clients_come_back_as_they_are(cohort: Cohort) -> None:
    client = cohort.updates[0]
    for updates in ([client], [replace(client, num_examples=n) for n in (3, 8, 1)]):
        assert_close(products(weighted_mean(updates, cohort.current)), ideal([client]))


def test_every_client_counts_not_the_first_only() -> None:
    cohort = make_cohort()
    merged = weighted_mean(cohort.updates, cohort.current)
    for k in range(3):
        without = weighted_mean(cohort.updates[:k] + cohort.updates[k + 1 :], cohort.current)
        assert all(not torch.allclose(merged.factors[n].A, without.factors[n].A) for n in merged.factors)
        assert all(not torch.allclose(merged.factors[n].B, without.factors[n].B) for n in merged.factors)


def test_a_client_with_thrice_the_rows_counts_as_three_clients() -> None:
    cohort = make_cohort(rows=(6, 2, 2))
    first, *others = cohort.updates
    split = [replace(first, num_examples=2)] * 3 + others
    assert_close(
        weighted_mean(cohort.updates, cohort.current).to_tensors(), weighted_mean(split, cohort.current).to_tensors()
    )


def test_the_order_of_clients_does_not_matter() -> None:
    cohort = make_cohort(scalings=(1.0, 2.0, 3.0))
    assert_close(
        weighted_mean(cohort.updates[::-1], cohort.current).to_tensors(),
        weighted_mean(cohort.updates, cohort.current).to_tensors(),
    )


def test_permuting_all_clients_ranks_alike_changes_nothing_but_permuting_one_clients_does() -> None:
    cohort = make_cohort()
    expected = products(weighted_mean(cohort.updates, cohort.current))
    alike = [per_layer(u, lambda f: permute_ranks(f, [2, 0, 1])) for u in cohort.updates]
    assert_close(products(weighted_mean(alike, cohort.current)), expected)
    mixed_up = products(weighted_mean([*alike[:1], *cohort.updates[1:]], cohort.current))
    assert all(not torch.allclose(mixed_up[layer], expected[layer]) for layer in expected)


def test_the_product_of_means_is_not_the_mean_of_products() -> None:
    cohort = make_cohort()
    assert dense_error(cohort.updates, weighted_mean(cohort.updates, cohort.current)) > 0.1


@settings(max_examples=15, deadline=None)
@given(cohorts(mixed=False))
def test_a_frozen_a_is_sent_back_bit_by_bit_and_makes_the_mean_exact(cohort: Cohort) -> None:
    cohort = share_a(cohort)
    merged = make(FedIt, frozen_a=True).aggregate(iter(cohort.updates), cohort.current)
    assert all(torch.equal(merged.factors[layer].A, f.A) for layer, f in cohort.current.factors.items())
    assert_close(products(merged), ideal(cohort.updates))


@pytest.mark.parametrize("frozen_a", [False, True])
def test_no_more_than_one_update_is_held_at_a_time(frozen_a: bool) -> None:
    cohort = make_cohort()
    seen: list[weakref.ref[ClientUpdate]] = []
    watched: list[weakref.ref[torch.Tensor]] = []

    def fresh(k: int) -> ClientUpdate:
        assert all(ref() is None for ref in seen), "an earlier update is still alive"
        assert all(ref() is None for ref in watched), "an earlier update's tensors are still alive"
        update = per_layer(make_cohort(seed=k).updates[0], lambda f: replace(f, B=f.B.clone()))
        seen.append(weakref.ref(update))
        watched.extend(weakref.ref(f.B) for f in update.factors.values())
        return update

    def stream() -> Iterator[ClientUpdate]:
        for k in range(6):
            yield fresh(k)

    make(FedIt, frozen_a).aggregate(stream(), cohort.current)
    assert len(seen) == 6


def test_sums_are_taken_in_double_precision() -> None:
    cohort = make_cohort()
    single = [per_layer(u, lambda f: replace(f, A=f.A.float(), B=f.B.float())) for u in cohort.updates]
    first, last = single[0], per_layer(single[0], lambda f: replace(f, A=-f.A, B=-f.B))
    tiny = per_layer(single[1], lambda f: replace(f, A=f.A * 1e-8, B=f.B * 1e-8))
    # in single precision the tiny one would drown between the others
    cancelling = [replace(u, num_examples=n) for u, n in [(first, 9), (tiny, 1), (last, 9)]]
    current = AdapterState({n: replace(f, A=f.A.float(), B=f.B.float()) for n, f in cohort.current.factors.items()})
    merged = weighted_mean([replace(u, dense={}) for u in cancelling], current)
    for layer, f in merged.factors.items():
        assert f.A.dtype == torch.float32
        torch.testing.assert_close(f.A, tiny.factors[layer].A / 19, rtol=1e-3, atol=0)


def test_results_have_the_type_of_the_adapter_and_are_contiguous() -> None:
    cohort = make_cohort()
    current = AdapterState.from_tensors({n: t.float() for n, t in cohort.current.to_tensors().items()}, 2.0)
    for tensor in weighted_mean(cohort.updates, current).to_tensors().values():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()


def test_dense_tensors_that_nobody_sends_stay() -> None:
    cohort = make_cohort()
    silent = [replace(u, dense={}) for u in cohort.updates]
    kept = cohort.current.dense["classifier.weight"]
    assert torch.equal(weighted_mean(silent, cohort.current).dense["classifier.weight"], kept)
    assert torch.equal(mean_dense(silent, cohort.current)["classifier.weight"], kept)


def test_a_head_that_some_clients_keep_to_themselves_is_refused() -> None:
    cohort = make_cohort()
    updates = [cohort.updates[0], replace(cohort.updates[1], dense={})]
    with pytest.raises(AdapterError, match=r"client '1' sent classifier\.weight"):
        weighted_mean(updates, cohort.current)


def test_mixed_ranks_are_refused_with_the_names_of_client_and_tensor() -> None:
    cohort = make_cohort(ranks=(3, 3, 2))
    with pytest.raises(AdapterError, match=r"client '2' sent encoder\.0\.query\.lora_A\.weight.*mixed ranks"):
        weighted_mean(cohort.updates, cohort.current)


def test_a_cohort_without_rows_is_refused() -> None:
    cohort = make_cohort(rows=(0, 0, 0))
    for updates in (cohort.updates, []):
        with pytest.raises(TooFewClientsError):
            weighted_mean(updates, cohort.current)
