"""Noise on factors, as it reaches their product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import product_noise
from benchmarks.product_noise import FFA, LORA, drawn, expected, factors


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(24, 56, 4), (56, 24, 4), (40, 7, 3)])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0])
def test_each_term_of_the_product_is_as_large_as_its_closed_form(
    d_out: int, d_in: int, rank: int, sigma: float
) -> None:
    rng = np.random.default_rng(d_out)
    b, a = factors(d_out, d_in, rank, rng)
    closed, found = expected(b, a, sigma), drawn(b, a, sigma, 1000, rng)
    for name, value in closed.items():
        assert found[name] == pytest.approx(value, rel=0.05), name
    assert found[LORA] == pytest.approx(sum(closed.values()), rel=0.05)
    assert found[FFA] == pytest.approx(closed["xB A"], rel=0.05)


def test_the_terms_add_up_to_what_the_product_is_off() -> None:
    rng = np.random.default_rng(1)
    b, a = factors(6, 11, 2, rng)
    noise_b, noise_a = rng.standard_normal(b.shape), rng.standard_normal(a.shape)
    off = (b + noise_b) @ (a + noise_a) - b @ a
    np.testing.assert_allclose(off, noise_b @ a + b @ noise_a + noise_b @ noise_a, atol=1e-12)


def test_doubled_noise_is_doubled_by_ffa_lora_and_up_to_fourfold_by_lora() -> None:
    b, a = factors(24, 56, 4, np.random.default_rng(0))
    small, large = expected(b, a, 5.0), expected(b, a, 10.0)
    assert np.sqrt(large["xB A"] / small["xB A"]) == pytest.approx(2)
    assert np.sqrt(sum(large.values()) / sum(small.values())) == pytest.approx(4, rel=0.01)


def test_the_benchmark_draws_its_figure_and_equal_seeds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(product_noise, "DRAWS", 2)
    for name in ("one.png", "two.png"):
        product_noise.main(["--out", str(tmp_path / name)])
    assert "sigma 1.0000: LoRA" in capsys.readouterr().out
    image = (tmp_path / "one.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert (tmp_path / "two.png").read_bytes() == image
