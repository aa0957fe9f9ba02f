"""Every method in a whole run: what is saved is what was scored, and PEFT loads it into the untouched base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.rescoring import rescore
from fedpeft.runs import read_events
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import STRATEGIES

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
