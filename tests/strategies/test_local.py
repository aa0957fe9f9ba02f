"""Local training: nothing travels, and every client has a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.runs.history import History
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies.local import Local
from tests.strategies.oracles import make, make_cohort


def test_nothing_is_merged() -> None:
    cohort = make_cohort()
    seen = iter(cohort.updates)
    assert make(Local).aggregate(seen, cohort.current) is cohort.current
    assert next(seen, None) is None


@pytest.mark.parametrize("kind", ["lora", "ffa-lora"])
def test_clients_train_alone_and_send_nothing(text_config: Any, tmp_path: Path, kind: str) -> None:
    config = text_config(strategy__name="local", adapter__kind=kind)
    assert simulate(config, tmp_path / "run").reason == "completed"
    history = History.read(tmp_path / "run")
    assert (history.bytes_up, history.bytes_down) == (0, 0)
    assert not history.faults
    assert all("aggregation_error" not in event for event in history.rounds.values())
    own = [load_file(path) for path in sorted((tmp_path / "run").glob("clients/*/adapter/*.safetensors"))]
    assert len(own) == 3
    trained = [name for name in own[0] if kind == "lora" or ".lora_A." not in name]
    assert not any(torch.equal(own[0][name], own[1][name]) for name in trained)


def test_a_client_goes_on_from_where_it_was(text_config: Any, tmp_path: Path) -> None:
    """A client alone learns the same in a federation of one whose server averages."""
    settings = {"partition__scheme": "iid", "partition__by": None, "federation__clients": 1, "run__seed": 3}
    weights = []
    for method in ("local", "fedit"):
        config = text_config(strategy__name=method, **settings)
        simulate(config, tmp_path / method)
        folder = tmp_path / method / ("clients/0/adapter" if method == "local" else "adapter")
        weights.append(load_file(folder / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
