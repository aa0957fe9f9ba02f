"""Sources of randomness: the right distributions, and which of them can be replayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.privacy import randomness as module
from fedpeft.privacy.randomness import Randomness, secure, seeded


@pytest.mark.parametrize("source", [secure(), seeded(1, "test")])
def test_numbers_are_uniform_and_normal(source: Randomness) -> None:
    from scipy import stats

    drawn = source.uniform(20_000)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-6
    noise = source.normal((100, 203))
    assert noise.dtype == torch.float64
    assert noise.shape == (100, 203)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-6
    assert abs(np.corrcoef(noise.flatten().numpy()[:-1], noise.flatten().numpy()[1:])[0, 1]) < 0.04
    assert 0 <= source.seed() < 2**63
    assert source.normal(()).shape == ()


def test_a_seed_repeats_and_the_system_does_not() -> None:
    assert torch.equal(seeded(1, "a", 2).normal((5,)), seeded(1, "a", 2).normal((5,)))
    assert not torch.equal(seeded(1, "a", 2).normal((5,)), seeded(1, "a", 3).normal((5,)))
    assert not torch.equal(secure().normal((5,)), secure().normal((5,)))
    assert secure().seed() != secure().seed()


def test_secure_numbers_ask_the_operating_system_for_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = module.os.urandom
    monkeypatch.setattr(module.os, "urandom", lambda count: (asked.append(count), real(count))[1])
    np.random.seed(0)  # noqa: NPY002 -- what anybody seeds has no part in it
    torch.manual_seed(0)
    source = secure()
    source.uniform(7)
    source.normal((3, 3))
    source.seed()
    assert sum(asked) == 8 * (7 + 10 + 1)


def test_secure_normal_numbers_are_finite_at_the_ends_of_the_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr(module.os, "urandom", lambda count, byte=byte: byte * count)
        assert torch.isfinite(secure().normal((4,))).all()
        assert (secure().uniform(3) < 1).all()
