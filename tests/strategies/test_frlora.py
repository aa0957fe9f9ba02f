"""FRLoRA against the formulas of the paper, on dense weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from fedpeft.adapters.base_change import dense
from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.config import configure
from fedpeft.errors import ConfigError
from fedpeft.strategies import with_typed_options
from fedpeft.strategies.frlora import FrLora
from tests.strategies.oracles import LAYERS, Cohort, cohorts, make, make_cohort, mean, permuted

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def started(cohort: Cohort) -> AdapterState:
    """Return (A0, B0) with B0 not zero, as a principal part has it."""
    draw = torch.Generator().manual_seed(9)
    factors = {
        layer: LoraFactors(f.A, torch.randn(f.B.shape, generator=draw, dtype=torch.float64), f.scaling)
        for layer, f in cohort.current.factors.items()
    }
    return AdapterState(factors, cohort.current.dense)


@given(cohorts(mixed=False))
def test_the_base_moves_by_the_product_of_means_less_the_start(cohort: Cohort) -> None:
    start = started(cohort)
    merged = make(FrLora).aggregate(cohort.updates, start)
    for layer, f in start.factors.items():
        A = mean([u.factors[layer].A for u in cohort.updates], cohort.updates)
        B = mean([u.factors[layer].scaling / f.scaling * u.factors[layer].B for u in cohort.updates], cohort.updates)
        torch.testing.assert_close(dense(merged.base[layer]), f.scaling * (B @ A - f.B @ f.A), **CLOSE)
        assert torch.equal(merged.factors[layer].A, f.A)
        assert torch.equal(merged.factors[layer].B, f.B)


def test_one_client_comes_back_exactly_over_rounds() -> None:
    cohort = make_cohort(rows=(5,), ranks=(3,), scalings=(2.0,))
    strategy, state = make(FrLora), started(cohort)
    learned = {layer: torch.zeros(11, 7, dtype=torch.float64) for layer in LAYERS}
    for _ in range(3):
        before = state
        state = strategy.aggregate(cohort.updates, state)
        for layer in LAYERS:
            learned[layer] += cohort.updates[0].factors[layer].product() - before.factors[layer].product()
            torch.testing.assert_close(dense(state.base[layer]), learned[layer], **CLOSE)


def test_permuting_all_clients_ranks_alike_changes_nothing_and_one_alone_does() -> None:
    cohort = make_cohort()
    start = started(cohort)
    order = [2, 0, 1]
    plain = make(FrLora).aggregate(cohort.updates, start)
    alike = make(FrLora).aggregate([permuted(u, order) for u in cohort.updates], start)
    alone = make(FrLora).aggregate([permuted(cohort.updates[0], order), *cohort.updates[1:]], start)
    torch.testing.assert_close(dense(plain.base[LAYERS[0]]), dense(alike.base[LAYERS[0]]), **CLOSE)
    assert torch.dist(dense(plain.base[LAYERS[0]]), dense(alone.base[LAYERS[0]])) > 0.1


def test_the_principal_part_is_implied_and_nothing_else_allowed() -> None:
    config = configure({"strategy.name": "frlora"}, preset="digits")
    assert with_typed_options(config).adapter.init == "pissa"
    other = configure({"strategy.name": "frlora", "adapter.init": "gaussian"}, preset="digits")
    with pytest.raises(ConfigError, match=r"'gaussian'.*needs 'pissa'"):
        with_typed_options(other)
