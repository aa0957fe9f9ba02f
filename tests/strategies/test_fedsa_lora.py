"""FedSA-LoRA: A is averaged, B never seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fedpeft.adapters.state import Role
from fedpeft.config import AdapterConfig
from fedpeft.errors import ConfigError
from fedpeft.strategies.fedsa_lora import FedSaLora
from tests.strategies.oracles import Cohort, assert_close, cohorts, make, mean


@settings(max_examples=40, deadline=None)
@given(cohorts(mixed=False))
def test_a_is_the_weighted_mean_and_b_stays_as_it_was(cohort: Cohort) -> None:
    merged = make(FedSaLora).aggregate(iter(cohort.updates), cohort.current)
    for layer, f in merged.factors.items():
        expected = mean([u.factors[layer].A for u in cohort.updates], cohort.updates)
        assert_close({"A": f.A}, {"A": expected})
        assert torch.equal(f.B, cohort.current.factors[layer].B)
    reversed_order = make(FedSaLora).aggregate(iter(cohort.updates[::-1]), cohort.current)
    assert_close({n: f.A for n, f in reversed_order.factors.items()}, {n: f.A for n, f in merged.factors.items()})


def test_b_is_trained_and_never_sent() -> None:
    exchange = FedSaLora.exchange(1)
    assert Role.B in exchange.trained
    assert exchange.sent_up(["x.lora_A.weight", "x.lora_B.weight", "head"], ()) == ["x.lora_A.weight", "head"]


def test_a_frozen_a_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fedsa-lora.*ffa-lora"):
        FedSaLora.check(FedSaLora.parse_options({}), AdapterConfig(kind="ffa-lora"))
