"""Whole runs that protect clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedpeft.adapters.state import fingerprint
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.runs import read_events
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies.averaging.private_mean import (
    CLIP,
)
from tests.strategies.averaging.private_clients import ABLE
from tests.strategies.oracles import assert_close

Make = Callable[..., RunConfig]


EVEN = {"partition__scheme": "iid", "federation__clients": 4}  # 24 rows each


def private(make: Make, **settings: Any) -> RunConfig:
    return make(**{**EVEN, "privacy__level": "client", "privacy__noise_multiplier": 0.0, **settings})


@pytest.mark.parametrize("name", ABLE)
def test_without_noise_or_clipping_equal_clients_give_the_plain_method(
    name: str, text_config: Make, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy__name": name, "federation__rounds": 3}
    plain = simulate(text_config(**EVEN, **settings), tmp_path / "plain").path
    same = simulate(private(text_config, privacy__max_update_norm=1e6, **settings), tmp_path / "private").path
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (plain, same))
    assert_close(two, one, 2e-5)
    assert {f"mean:{CLIP}"} <= load_file(next((same / "checkpoints").glob("*/state.safetensors"))).keys()


def test_a_run_tells_no_client_from_another_and_repeats_to_the_byte(text_config: Make, tmp_path: Path) -> None:
    config = private(text_config, privacy__noise_multiplier=0.5, strategy__name="fedit", federation__fraction=0.6)
    paths = [simulate(config, tmp_path / name).path for name in ("one", "two")]
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in paths)
    assert fingerprint(one) == fingerprint(two)
    events = list(read_events(paths[0]))
    assert not [event for event in events if event["event"] == "client"]
    for event in events:
        if event["event"] == "round":
            assert event["train_loss"] is None
            assert "aggregation_error" not in event


def test_a_dry_run_counts_and_refuses_what_a_run_would(text_config: Make) -> None:
    planned = plan(private(text_config, strategy__name="fedit", federation__fraction=0.5))
    assert planned.cohort == 2
    with pytest.raises(ConfigError, match="lora-fair"):
        plan(private(text_config, strategy__name="lora-fair"))
