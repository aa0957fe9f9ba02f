"""Clipped updates and noise on their sum, against sums that anyone can read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters.state import fingerprint
from fedpeft.errors import ConfigError
from fedpeft.privacy.client_mechanism import ClientPrivacy
from fedpeft.strategies.averaging.private_mean import (
    PrivateMean,
    update_norm,
)
from tests.strategies.averaging.private_clients import SILENT, clipped_mean, moving, run, start
from tests.strategies.oracles import assert_close
from tests.strategies.test_base import A, adding, broken, raising

LENGTHS = {1: 0.1, 2: 3.0, 3: 0.9, 4: 50.0}


@pytest.mark.parametrize("frozen", [[], [A]], ids=["lora", "ffa-lora"])
@pytest.mark.parametrize("cohort", ["poisson", "fixed"])
def test_without_noise_a_round_is_the_sum_of_clipped_updates_whatever_their_rows(
    cohort: Any, frozen: list[str]
) -> None:
    clients = {node: moving(node, length, examples=7**node) for node, length in LENGTHS.items()}
    final, _, _ = run(clients, replace(SILENT, cohort=cohort), frozen=frozen)
    assert_close(final, clipped_mean(LENGTHS, 4, 1.0, frozen))


@pytest.mark.parametrize("cohort", ["poisson", "fixed"])
def test_the_divisor_is_the_expected_cohort_whoever_answers(cohort: Any) -> None:
    clients = {node: moving(node, 2.0) for node in range(1, 9)}
    for seed in range(4):
        final, reports, _ = run(clients, replace(SILENT, cohort=cohort), fraction_train=0.25, seed=seed)
        drawn = {int(update.client_id) + 1: 2.0 for update in reports[0].updates}
        assert_close(final, clipped_mean(drawn, 2, 1.0))


@pytest.mark.parametrize("cohort", ["poisson", "fixed"])
@pytest.mark.parametrize("kind", ["nan", "infinity", "shape", "missing", "count", "raises"])
def test_clients_that_fail_or_are_refused_count_as_zero(kind: str, cohort: Any) -> None:
    clients = {
        1: moving(1, 0.5),
        2: raising if kind == "raises" else broken(kind),
        3: moving(3, 0.5),
        4: moving(4, 9.0),
    }
    final, reports, _ = run(clients, replace(SILENT, cohort=cohort), min_clients=4)
    assert_close(final, clipped_mean({1: 0.5, 3: 0.5, 4: 9.0}, 4, 1.0))
    assert [fault.client_id for fault in reports[0].faults] == ["1"]


def test_a_client_that_changes_nothing_does_no_harm() -> None:
    final, _, _ = run({1: adding(0.0), 2: moving(2, 0.5)})
    assert_close(final, clipped_mean({2: 0.5}, 2, 1.0))


def test_a_change_that_float64_cannot_measure_counts_as_zero() -> None:
    private = PrivateMean(SILENT, 0)
    far = torch.full((2, 3), 1.5e308, dtype=torch.float64)
    merged = private.merge([{"x": -far}, {"x": far / 2}], {"x": far}, 1)
    assert torch.isfinite(merged["x"]).all()
    torch.testing.assert_close(merged["x"], far)


def test_an_empty_cohort_still_takes_the_noise_and_makes_a_round() -> None:
    clients = {node: moving(node, 1.0) for node in (1, 2, 3)}
    noisy = ClientPrivacy(1.0)
    final, reports, _ = run(clients, noisy, fraction_train=0.01, min_clients=3)
    assert reports[0].updates == []
    assert reports[0].bytes_up == reports[0].bytes_down == 0
    alone = PrivateMean(noisy, 0)
    alone.expected = 0.03
    assert_close(final, alone.merge([], start(), 1))
    assert all((final[name] != tensor).all() for name, tensor in start().items())


def test_a_round_in_which_everybody_fails_is_noise() -> None:
    final, reports, _ = run({1: raising, 2: raising}, ClientPrivacy(1.0))
    alone = PrivateMean(ClientPrivacy(1.0), 0)
    alone.expected = 2
    assert_close(final, alone.merge([], start(), 1))
    assert len(reports[0].faults) == 2


@pytest.mark.parametrize(("cohort", "sensitivity"), [("poisson", 1), ("fixed", 2)])
@pytest.mark.parametrize("rng", ["seeded", "secure"])
def test_the_noise_is_as_wide_as_the_sensitivity_asks(cohort: Any, sensitivity: int, rng: Any) -> None:
    z, bound, expected = 1.3, 0.7, 25.0
    zeros = {"factor": torch.zeros(400, 300, dtype=torch.float64), "head": torch.zeros(7, 5000, dtype=torch.float64)}
    private = PrivateMean(ClientPrivacy(z, bound, cohort, rng), 0)
    private.expected = expected
    first, second = private.merge([], zeros, 1), private.merge([], zeros, 2)
    wanted = z * sensitivity * bound / expected
    for name in zeros:
        numbers = first[name].flatten()
        error = 5 / math.sqrt(len(numbers))  # five standard errors
        assert abs(float(numbers.mean())) < error * wanted
        assert float(numbers.std()) == pytest.approx(wanted, rel=error)
        assert float((numbers.abs() < wanted).double().mean()) == pytest.approx(0.6827, abs=error)
        assert abs(float(torch.corrcoef(torch.stack([numbers, second[name].flatten()]))[0, 1])) < error


def test_secure_noise_and_cohorts_do_not_repeat() -> None:
    clients = {node: adding(0.0) for node in range(1, 65)}
    secure = ClientPrivacy(1.0, rng="secure")
    (one, first, _), (two, second, _) = (run(clients, secure, fraction_train=0.5) for _ in range(2))
    assert fingerprint(one) != fingerprint(two)
    assert [u.client_id for u in first[0].updates] != [u.client_id for u in second[0].updates]


def test_each_client_joins_a_poisson_cohort_by_its_own_coin() -> None:
    private, names = PrivateMean(SILENT, 5), [str(index) for index in range(40)]
    cohorts = [private.draw(names, 0.3, number) for number in range(1, 501)]
    assert private.expected == 12
    assert cohorts == [PrivateMean(SILENT, 5).draw(names, 0.3, number) for number in range(1, 501)]
    assert all(cohort == sorted(cohort, key=int) for cohort in cohorts)
    sizes = torch.tensor([len(cohort) for cohort in cohorts], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(12, abs=0.65)  # five standard errors
    assert float(sizes.var()) == pytest.approx(40 * 0.3 * 0.7, rel=0.32)  # as many coins as clients, not one
    shares = [sum(name in cohort for cohort in cohorts) / 500 for name in names]
    assert all(share == pytest.approx(0.3, abs=0.1) for share in shares)
    assert private.draw(names, 1.0, 1) == names


def test_min_clients_must_exist_and_need_not_be_drawn() -> None:
    clients = {node: moving(node, 1.0) for node in range(1, 11)}
    sizes = [len(report.updates) for report in run(clients, rounds=8, fraction_train=0.2, min_clients=9)[1]]
    assert max(sizes) < 9
    assert len(set(sizes)) > 1
    with pytest.raises(ConfigError, match=r"min_clients = 11.*10 clients"):
        run(clients, fraction_train=0.2, min_clients=11)


@given(
    st.integers(0, 2**20),
    st.lists(st.floats(0, 1e8), min_size=1, max_size=5),
    st.floats(1e-4, 1e4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_one_client_moves_the_sum_by_no_more_than_the_bound(
    seed: int, lengths: list[float], bound: float, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(seed)
    before = {"a": torch.randn(2, 5, generator=draw), "head": torch.randn(4, 3, generator=draw)}
    before = {name: tensor.to(dtype) for name, tensor in before.items()}
    clients = [
        {name: t + length * torch.randn(t.shape, generator=draw) for name, t in before.items()} for length in lengths
    ]
    wide = {name: tensor.double() for name, tensor in before.items()}
    sums = []
    for cohort in (clients, clients[1:]):
        private = PrivateMean(replace(SILENT, clip=bound), 0)
        private.expected = 1.0  # so that what is returned is the sum
        merged = private.merge(cohort, wide, 1)
        sums.append({name: merged[name] - wide[name] for name in wide})
    # what rounding leaves of sums, and of adding x_0 and taking it away
    slack = 1e-12 * (1 + bound * len(lengths))
    assert update_norm({name: sums[0][name] - sums[1][name] for name in wide}) <= bound + slack
