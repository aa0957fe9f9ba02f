"""The clipping norm that follows the clients' updates, privately."""

from __future__ import annotations

import math

import pytest
import torch

from fedpeft.privacy.client_mechanism import AdaptiveClipping, ClientPrivacy
from fedpeft.strategies.averaging.private_mean import (
    CLIP,
    PrivateMean,
)


def test_the_count_is_as_noisy_as_it_is_said_to_be() -> None:
    for cohort, sensitivity in (("poisson", 1), ("fixed", 2)):
        adaptive = AdaptiveClipping(0.5, 1.0, count_noise=3.0)
        moves = []
        for seed in range(1500):
            private = PrivateMean(ClientPrivacy(1.0, cohort=cohort, adaptive=adaptive), seed)  # type: ignore[arg-type]
            private.expected = 60.0
            private.merge([], {"x": torch.zeros(1, 2)}, 1)
            moves.append(-math.log(private.clip))  # eta (b - g), where nobody answered: the noise alone
        assert float(torch.tensor(moves).std()) == pytest.approx(sensitivity * 3.0 / 60, rel=0.1)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("begin", [0.05, 300.0])
def test_adaptive_clipping_finds_the_quantile_of_the_norms(quantile: float, begin: float) -> None:
    zero = {"x": torch.zeros(3, 2, dtype=torch.float64)}
    clients = [{"x": torch.full((3, 2), norm / math.sqrt(6), dtype=torch.float64)} for norm in range(1, 101)]
    private = PrivateMean(ClientPrivacy(0.5, begin, adaptive=AdaptiveClipping(quantile, 0.5, 2.0)), 0)
    private.expected = 100
    bounds = []
    for number in range(1, 161):
        private.merge(clients, zero, number)
        bounds.append(private.clip)
    assert sum(bounds[-40:]) / 40 == pytest.approx(100 * quantile, rel=0.1)


def test_the_bound_stays_within_a_millionfold_whatever_the_noise() -> None:
    for quantile, reach in ((1e-9, 1e-6), (1 - 1e-9, 1e6)):
        private = PrivateMean(ClientPrivacy(1.0, 2.0, adaptive=AdaptiveClipping(quantile, 1e3, 1.0)), 0)
        private.expected = 1e-3
        for number in range(1, 5):
            private.merge([], {"x": torch.zeros(2, 3)}, number)
            assert 2e-6 * (1 - 1e-9) <= private.clip <= 2e6 * (1 + 1e-9)
        private.expected = 100
        everybody = [{"x": torch.zeros(2, 3) if reach < 1 else torch.full((2, 3), 1e30)}] * 100
        private.merge(everybody, {"x": torch.zeros(2, 3)}, 9)
        assert private.clip == pytest.approx(2 * reach)


def test_the_bound_of_a_round_is_the_one_before_its_count() -> None:
    private = PrivateMean(ClientPrivacy(0.0, 1.0, adaptive=AdaptiveClipping(0.5, 0.2, 1e-9)), 0)
    zero, far = {"x": torch.zeros(1, 2, dtype=torch.float64)}, {"x": torch.tensor([[30.0, 40.0]], dtype=torch.float64)}
    torch.testing.assert_close(private.merge([far], zero, 1)["x"], far["x"] / 50)
    assert private.clip == pytest.approx(math.exp(0.1))
    torch.testing.assert_close(private.merge([far], zero, 2)["x"], far["x"] * (math.exp(0.1) / 50))
    assert private.memory()[CLIP].item() == private.clip
