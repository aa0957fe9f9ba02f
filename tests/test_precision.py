from __future__ import annotations

from collections.abc import Callable

import pytest

from fedpeft.config import RunConfig
from fedpeft.deployment import run_config
from fedpeft.errors import ConfigError
from fedpeft.precision import Timing, of_hardware, time_products

Make = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("amx", "avx512", "wanted"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_is_fixed_when_it_is_read(
    text_config: Make, monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, wanted: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    assert of_hardware() == wanted
    config = text_config(train__precision="auto")
    assert config.train.precision == wanted
    assert config.model_dump()["train"]["precision"] == wanted


def test_nodes_are_not_left_to_choose_for_themselves() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision = 'auto'.*'fp32' or 'bf16'"):
        run_config({"train.precision": "auto"})


def test_a_timing_recommends_only_what_is_clearly_faster() -> None:
    assert Timing(fp32=0.2, bf16=0.1).better == "bf16"
    assert Timing(fp32=0.1, bf16=0.2).better == "fp32"
    assert Timing(fp32=0.1, bf16=0.11).better is None
    assert Timing(fp32=1e-5, bf16=1e-6).better is None


def test_products_are_timed_in_both_precisions() -> None:
    once, twice = (time_products([(64, 32)] * count, 16, seconds=0.0) for count in (1, 2))
    assert min(once.fp32, once.bf16, twice.fp32, twice.bf16) > 0
