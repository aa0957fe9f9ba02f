"""Robust means and server optimizers on top of the methods that average."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters.state import A_SUFFIX, AdapterState, role_of
from fedpeft.errors import ConfigError
from fedpeft.strategies import FedIt, FedSaLora, RoLora
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.averaged import AveragingStrategy
from tests.strategies.oracles import Cohort, assert_close, cohorts, make, make_cohort, per_layer, share_a
from tests.strategies.test_base import FunctionGrid, adding, initial, to_record

METHODS = [FedIt, RoLora, FedSaLora]
ROBUST = [
    {"robust": "median"},
    {"robust": "trimmed-mean", "trim": 0.3},
    {"robust": "krum", "byzantine": 1},
    {"robust": "norm-clip"},
]


def merge(method: type[AveragingStrategy], cohort: Cohort, server_round: int = 1, **options: object) -> AdapterState:
    return make(method, **options).aggregate(iter(cohort.updates), cohort.current, server_round)


def five(seed: int = 0) -> Cohort:
    """Return five honest clients near each other, of equal scalings."""
    cohort = make_cohort(seed, rows=(3, 9, 4, 8, 6), ranks=(2,) * 5, scalings=(2.0,) * 5)
    centre = cohort.updates[0]

    def near(f, g):  # type: ignore[no-untyped-def]
        return replace(f, A=g.A + 0.01 * f.A, B=g.B + 0.01 * f.B)

    updates = [
        replace(
            u,
            factors={n: near(f, centre.factors[n]) for n, f in u.factors.items()},
            dense={n: centre.dense[n] + 0.01 * t for n, t in u.dense.items()},
        )
        for u in cohort.updates
    ]
    return Cohort(updates, cohort.current)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(cohorts(mixed=False))
def test_momentum_of_zero_with_a_learning_rate_of_one_is_the_plain_mean(
    method: type[AveragingStrategy], cohort: Cohort
) -> None:
    plain = merge(method, cohort).to_tensors()
    stepped = merge(method, cohort, server_optimizer="avgm", server_beta1=0.0).to_tensors()
    assert_close(stepped, plain)


@pytest.mark.parametrize("options", ROBUST)
@pytest.mark.parametrize("method", METHODS)
def test_one_liar_hardly_moves_a_robust_mean_and_takes_the_plain_one_anywhere(
    method: type[AveragingStrategy], options: dict[str, object]
) -> None:
    honest = five()
    lying = per_layer(honest.updates[2], lambda f: replace(f, A=1e6 * f.A, B=1e6 * f.B))
    attacked = Cohort([lying if u is honest.updates[2] else u for u in honest.updates], honest.current)
    fair = merge(method, honest).to_tensors()

    def moved(**given: object) -> float:
        found = merge(method, attacked, **given).to_tensors()
        return max(float((found[name] - fair[name]).abs().max()) for name in fair)

    assert moved() > 1e4
    assert moved(**options) < (0.1 if options["robust"] != "norm-clip" else 10.0)


def test_the_median_is_that_of_each_entry_on_one_scale() -> None:
    cohort = make_cohort(3, scalings=(1.0, 2.0, 4.0), output_scaling=2.0)
    merged = merge(FedIt, cohort, robust="median")
    for layer, f in merged.factors.items():
        scaled = torch.stack([u.factors[layer].B * u.factors[layer].scaling / 2.0 for u in cohort.updates])
        assert_close({"B": f.B}, {"B": scaled.median(dim=0).values})
        assert_close({"A": f.A}, {"A": torch.stack([u.factors[layer].A for u in cohort.updates]).median(dim=0).values})
    heads = torch.stack([u.dense["classifier.weight"] for u in cohort.updates])
    assert_close(merged.dense, {"classifier.weight": heads.median(dim=0).values})


@pytest.mark.parametrize(
    "options", [*ROBUST, {"server_optimizer": "adam"}, {"robust": "median", "server_optimizer": "yogi"}]
)
def test_what_a_round_does_not_train_stays_bit_by_bit(options: dict[str, object]) -> None:
    cohort = share_a(five())
    frozen = make(FedIt, frozen_a=True, **options).aggregate(iter(cohort.updates), cohort.current)
    odd = merge(RoLora, cohort, **options)
    for state in (frozen, odd):
        assert all(torch.equal(f.A, cohort.current.factors[layer].A) for layer, f in state.factors.items())
        assert not any(torch.equal(f.B, cohort.current.factors[layer].B) for layer, f in state.factors.items())
    even = merge(RoLora, cohort, server_round=2, **options)
    assert all(torch.equal(f.B, cohort.current.factors[layer].B) for layer, f in even.factors.items())


def test_momentum_goes_on_from_round_to_round_and_apart_for_each_factor() -> None:
    cohort = share_a(five())
    strategy = make(RoLora, server_optimizer="avgm", server_beta1=0.5)
    first = strategy.aggregate(iter(cohort.updates), cohort.current, 1)
    names = [n for n in first.to_tensors() if role_of(n) != "A"]
    assert {n.removeprefix("server_optimizer.momentum.") for n in strategy.memory()} == set(names)
    strategy.aggregate(iter(cohort.updates), cohort.current, 2)
    assert sum(n.endswith(A_SUFFIX) for n in strategy.memory()) == 2
    third = strategy.aggregate(iter(cohort.updates), cohort.current, 3)
    mean = weighted_mean(cohort.updates, cohort.current, trains_a=False)
    for layer, f in third.factors.items():
        start = cohort.current.factors[layer].B
        delta = mean.factors[layer].B - start
        assert_close({"B": f.B}, {"B": start + 1.5 * delta})  # the same delta a second time: 0.5 + 1


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.sampled_from(ROBUST))
def test_permuting_clients_changes_nothing(order: list[int], options: dict[str, object]) -> None:
    cohort = five(1)
    shuffled = Cohort([cohort.updates[index] for index in order], cohort.current)
    assert_close(merge(FedIt, shuffled, **options).to_tensors(), merge(FedIt, cohort, **options).to_tensors())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trim": 0.2}, r"strategy\.trim belongs to strategy\.robust = 'trimmed-mean'"),
        ({"robust": "krum", "max_norm": 1.0}, "norm-clip"),
        ({"server_tau": 0.1}, r"strategy\.server_tau needs strategy\.server_optimizer"),
        ({"server_optimizer": "avgm", "server_beta2": 0.9}, "has no beta2"),
        ({"robust": "mean"}, "median"),
        ({"server_optimizer": "adamw"}, "yogi"),
    ],
)
def test_options_that_would_be_ignored_or_do_not_exist_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        FedIt.parse_options(options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"robust": "trimmed-mean"}, r"strategy\.trim = 0\.1 of 3 clients leaves nobody out; give at least 0\.33"),
        ({"robust": "krum"}, "at least 5, and 3 clients are drawn"),
    ],
)
def test_a_cohort_too_small_for_a_robust_mean_is_refused_before_anybody_trains(
    options: dict[str, object], words: str
) -> None:
    grid = FunctionGrid({node: adding(1.0) for node in (1, 2, 3)})
    with pytest.raises(ConfigError, match=words):
        FedIt(client_ids={1: "a", 2: "b", 3: "c"}, **options).start(grid, to_record(initial()), 1)  # type: ignore[arg-type]
    assert grid.log == []
