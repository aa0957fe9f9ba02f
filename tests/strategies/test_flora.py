"""FLoRA against the dense sum of products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.adapters.base_change import dense
from fedpeft.adapters.draws import draw_a
from fedpeft.adapters.state import AdapterState
from fedpeft.config import configure
from fedpeft.errors import ConfigError
from fedpeft.strategies import with_typed_options
from fedpeft.strategies.flora import FLora
from tests.strategies.oracles import LAYERS, Cohort, cohorts, ideal, make, make_cohort, permuted

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def folded(cohort: Cohort) -> tuple[AdapterState, dict[str, Tensor]]:
    merged = make(FLora).aggregate(cohort.updates, cohort.current)
    return merged, {layer: dense(change) for layer, change in merged.base.items()}


@given(cohorts())
def test_the_base_moves_by_the_mean_of_products_whatever_ranks_and_scalings(cohort: Cohort) -> None:
    _, moved = folded(cohort)
    for layer, expected in ideal(cohort.updates).items():
        torch.testing.assert_close(moved[layer], expected, **CLOSE)


@given(cohorts(), st.randoms(use_true_random=False))
def test_neither_the_order_of_clients_nor_of_ones_ranks_changes_anything(cohort: Cohort, random: object) -> None:
    _, moved = folded(cohort)
    order = list(range(cohort.updates[0].factors[LAYERS[0]].rank))[::-1]
    others = [permuted(cohort.updates[0], order), *cohort.updates[1:]][::-1]
    _, again = folded(replace(cohort, updates=others))
    for layer in LAYERS:
        torch.testing.assert_close(moved[layer], again[layer], **CLOSE)


def test_clients_begin_again_with_another_random_a_and_b_zero() -> None:
    cohort = make_cohort()
    merged = make(FLora).aggregate(cohort.updates, cohort.current, 4)
    for layer, f in merged.factors.items():
        assert not f.B.any()
        assert torch.equal(f.A, draw_a(3, 5, layer, *f.A.shape).double())
        assert f.scaling == cohort.current.factors[layer].scaling
        assert FLora.exchange(5).draw == 5


def test_the_head_is_the_mean_weighted_with_rows() -> None:
    cohort = make_cohort(rows=(1, 3, 4))
    head = make(FLora).aggregate(cohort.updates, cohort.current).dense["classifier.weight"]
    expected = sum(u.dense["classifier.weight"] * u.num_examples / 8 for u in cohort.updates)
    torch.testing.assert_close(head, expected)


@pytest.mark.parametrize(("key", "value"), [("adapter.init", "gaussian"), ("adapter.kind", "ffa-lora")])
def test_what_a_new_draw_cannot_keep_is_refused(key: str, value: str) -> None:
    config = configure({key: value, "strategy.name": "flora"}, preset="digits")
    with pytest.raises(ConfigError, match=value):
        with_typed_options(config)
