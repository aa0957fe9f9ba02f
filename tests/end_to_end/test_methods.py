"""Every method in a whole run: what is saved is what was scored, and PEFT loads it into the untouched base."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.rescoring import rescore
from fedpeft.runs import read_events
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import STRATEGIES
from fedpeft.strategies.plan import plan

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_saved_adapter_is_what_was_scored(name: str, text_config: Make, tmp_path: Path) -> None:
    config = text_config(strategy__name=name, federation__rounds=3, run__checkpoint_every=1)
    run = simulate(config, tmp_path / "run").path
    events = [event for event in read_events(run) if event["event"] == "evaluate"]
    again = rescore(run, {})
    # an exact sum of many factors is another one than the sum of their products, in its last digits
    assert again["loss"] == pytest.approx(events[-1]["loss"], rel=1e-5)
    assert again["accuracy"] == events[-1]["accuracy"]
    assert events[-1]["loss"] < events[0]["loss"]
    assert load_file(next((run / "checkpoints").glob("*-0003/state.safetensors")))


@pytest.mark.parametrize("name", [name for name, method in STRATEGIES.items() if method.capabilities.mixed_ranks])
def test_clients_of_different_ranks_make_one_adapter(name: str, text_config: Make, tmp_path: Path) -> None:
    run = simulate(text_config(strategy__name=name, adapter__ranks="1,4,2"), tmp_path / "run").path
    events = [event for event in read_events(run) if event["event"] == "evaluate"]
    assert rescore(run, {})["loss"] == pytest.approx(events[-1]["loss"], rel=1e-5)
    assert events[-1]["loss"] < events[0]["loss"]


def test_a_local_head_goes_with_the_exact_sum(text_config: Make, tmp_path: Path) -> None:
    """The sum has a scaling of its own, which the head's owner must not multiply once more."""
    config = text_config(strategy__name="flora", adapter__head="local", federation__rounds=2)
    run = simulate(config, tmp_path / "run").path
    last = [event for event in read_events(run) if event["event"] == "evaluate"][-1]
    assert rescore(run, {})["loss"] == pytest.approx(last["loss"], rel=1e-5)
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    own = load_file(next(run.glob("clients/*/adapter/adapter_model.safetensors")))
    assert all((whole[name] == own[name]).all() for name in whole if ".lora_" in name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy__name": "fed-sb", "adapter__init": "pissa"}, "'pissa' is not for adapter.kind = 'lora-xs'"),
        ({"strategy__name": "florist", "adapter__init": "pissa"}, "threshold = 0.9"),
        ({"strategy__name": "hetlora", "adapter__kind": "ffa-lora"}, "'ffa-lora'"),
        ({"strategy__name": "flora", "federation__min_clients": 99}, "min_clients = 99"),
        ({"strategy__name": "fedit", "strategy__robust": "krum", "strategy__byzantine": 9}, "byzantine = 9"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(settings: dict[str, Any], words: str, text_config: Make) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan(text_config(**settings))
