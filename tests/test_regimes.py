"""The regression in which methods separate, in miniature: what separates them is rank, and not exactness alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import regimes
from benchmarks.regimes import AT, BELOW, FFA, METHODS, SHORT, Regression

SMALL = Regression(target_rank=4, rank=1, steps=15, rounds=4, clients=3, d_out=6, d_in=8)


def test_no_method_that_keeps_to_its_rank_goes_below_the_floor_and_moving_bases_do() -> None:
    found = {name: regimes.run(name, SMALL, 0) for name in METHODS}
    floor = regimes.floor(SMALL, 0)
    assert 0 < floor < 1
    for name, result in found.items():
        if name in ("fedex-lora", "flora"):  # whose base gains ranks
            assert result.rank > SMALL.rank
        elif name != "florist":  # which may keep more ranks than clients have
            assert result.rank == SMALL.rank
            assert result.excess >= floor - 1e-9
    assert found["flora"].excess < floor
    exact = {name for name, result in found.items() if result.error < 1e-9}
    assert exact == {FFA, "fedsvd", "rolora", "fedex-lora", "flora"}
    assert found[FFA].excess > found["fedit"].excess  # exact, and behind one that is not


def test_at_the_targets_rank_an_inexact_mean_gets_there_too() -> None:
    equal = replace(SMALL, rank=4, own=0.0, steps=40, rounds=10)
    assert regimes.run("fedit", equal, 0).excess < 0.02
    assert regimes.floor(equal, 0) == pytest.approx(0.0, abs=1e-9)


def test_the_floor_is_where_gradient_descent_on_the_mean_loss_ends() -> None:
    targets, C = SMALL.wanted(0)
    draw = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((6, 1), (1, 8)))
    for _ in range(3000):
        G = ((B @ A - targets) @ C).mean(dim=0)
        B, A = B - 0.05 * G @ A.T, A - 0.05 * B.T @ G
    assert regimes.excess(B @ A, targets, C) == pytest.approx(regimes.floor(SMALL, 0), abs=1e-6)


def test_the_table_has_all_methods_and_finds_its_place_in_the_document() -> None:
    table = regimes.regression_table(1, replace(SMALL, steps=2, rounds=1))
    assert len(table.splitlines()) == 2 + len(METHODS) + 1
    assert all(f"excess loss, {name}" in table for name in (BELOW, AT, SHORT))
    text = regimes.DOCUMENT.read_text(encoding="utf-8")
    for name in regimes.TABLES:
        assert f"| {name} |" in regimes.between(text, name, f"| {name} |")
