"""Runs whose workers train several clients at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.resident import Resident
from fedpeft.runs import Event, read_events
from fedpeft.simulations import batching
from fedpeft.simulations.batching import batched, bundling_of
from fedpeft.simulations.grids.ray import RayGrid
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import simulate
from tests.conftest import WatchedWorkers

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def still_config(tiny_bert: Path, text_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a small configuration of six clients whose base drops nothing."""
    folder = tmp_path_factory.mktemp("still") / "bert"
    shutil.copytree(tiny_bert, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings))

    def make(**own: object) -> RunConfig:
        six = {"partition__by": None, "partition__scheme": "iid", "federation__clients": 6, "train__batch_size": 4}
        return text_config(model__name=str(folder), **{**six, **own})

    return make


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def final_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def notes(run: RunConfig, out: Path) -> list[str]:
    said: list[Event] = []
    simulate(run, out, listener=said.append)
    return [str(event["message"]) for event in said if event["event"] == "note"]


@pytest.fixture(scope="module")
def runs(still_config: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run in this process, one by one and four at a time, plainly and privately."""
    folder = tmp_path_factory.mktemp("runs")
    private = {"privacy__level": "record", "privacy__noise_multiplier": 0.7}
    for name, own in (("plain", {}), ("private", private)):
        for size in ("off", 4):
            simulate(still_config(simulation__batch_clients=size, **own), folder / f"{name}-{size}")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["plain", "private"])
def test_a_run_of_clients_trained_together_is_that_of_clients_one_by_one(runs: dict[str, Path], name: str) -> None:
    one, other = adapter(runs[f"{name}-off"]), adapter(runs[f"{name}-4"])
    assert final_bytes(runs[f"{name}-off"]) != final_bytes(runs[f"{name}-4"])  # last digits tell that it was done
    for key, tensor in one.items():
        assert torch.allclose(tensor, other[key], rtol=1e-3, atol=1e-4), key
    kinds = [[event["event"] for event in read_events(runs[f"{name}-{size}"])] for size in ("off", 4)]
    assert kinds[0] == kinds[1]


def test_bytes_follow_neither_from_the_number_of_workers_nor_from_their_deaths(
    runs: dict[str, Path], still_config: Make, watched_workers: WatchedWorkers, tmp_path: Path
) -> None:
    config = still_config(simulation__batch_clients=4)
    (watched_workers.folder / "death").touch()
    said: list[Event] = []
    simulate(config, tmp_path / "two", grid=watched_workers.grid, listener=said.append)
    assert not (watched_workers.folder / "death").exists()
    assert sum("a worker died" in str(event.get("message")) for event in said) == 1
    private = still_config(
        simulation__batch_clients=4, privacy__level="record", privacy__noise_multiplier=0.7, run__seed=0
    )
    simulate(private, tmp_path / "private", grid=watched_workers.grid)
    with RayGrid("watched_clients:app", workers=1) as grid:
        simulate(config, tmp_path / "one", grid=grid)
    assert final_bytes(tmp_path / "two") == final_bytes(tmp_path / "one") == final_bytes(runs["plain-4"])
    assert final_bytes(tmp_path / "private") == final_bytes(runs["private-4"])


def test_auto_is_fixed_by_a_timing_and_never_where_it_loses(
    still_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = still_config(simulation__batch_clients="auto")
    home = Resident(config)
    monkeypatch.setattr(batching, "SIZES", (2, 5))
    for seconds, chosen in (((1.0, 1.0, 1.0), 5), ((1.0, 1.0, 9.0), 2), ((1.0, 2.0, 5.0), "off")):
        times = iter(seconds)
        monkeypatch.setattr(batching, "_fastest", lambda _, times=times: next(times))
        fixed, said = batched(config, home)
        assert fixed.simulation.batch_clients == chosen
        assert bundling_of(fixed).size == (1 if chosen == "off" else chosen)
        assert "one by one" in said if chosen == "off" else f"{chosen} clients" in said
    monkeypatch.undo()
    simulate(config, tmp_path / "run")
    assert 'batch_clients = "auto"' not in (tmp_path / "run" / "config.toml").read_text()


def test_what_cannot_be_trained_together_is_said_and_trained_one_by_one(
    text_config: Make, still_config: Make, tmp_path: Path
) -> None:
    drops = text_config(simulation__batch_clients=8, model__dropout="checkpoint")
    assert any("dropout is active" in note for note in plan(drops).notes)
    own = {"adapter__kind": "ia3", "strategy__name": "fedit", "federation__rounds": 1}
    said = notes(still_config(simulation__batch_clients=8, **own), tmp_path / "run")
    assert any("one by one, since adapter.kind = 'ia3'" in note for note in said)
    assert 'batch_clients = "off"' in (tmp_path / "run" / "config.toml").read_text()


def test_a_model_whose_gradients_change_beside_other_clients_is_found_out(
    still_config: Make,
) -> None:
    config = still_config(simulation__batch_clients=8)
    home = Resident(config)
    head = next(module for module in home.adapted.model.modules() if type(module).__name__ == "BertPooler")

    def mixes(module: torch.nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
        return output - output.mean(0)

    handle = head.register_forward_hook(mixes)
    assert "another gradient" in batched(config, home)[1]
    handle.remove()
    assert batched(config, home)[1] == ""


@pytest.mark.parametrize("level", ["record", "client"])
def test_what_is_tried_and_timed_of_a_private_run_depends_on_no_row_and_no_count(
    still_config: Make, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    config = still_config(
        simulation__batch_clients="auto", privacy__level=level, privacy__noise_multiplier=1.0, train__local_steps=1
    )
    home = Resident(config)
    public = SimpleNamespace(client_ids=home.partition.client_ids)
    assert (home.adapted, home.labels) != (None, ())  # what was made of rows before they go
    vars(home).update(data=SimpleNamespace(), partition=public)
    monkeypatch.setattr(batching, "SIZES", (2,))
    monkeypatch.setattr(batching, "GAIN", 0.0)
    fixed, said = batched(config, home)
    assert fixed.simulation.batch_clients == 2, said


@pytest.mark.parametrize("value", [0, -3, "x", "0", 1.5, True])
def test_only_a_number_of_clients_auto_and_off_are_taken(text_config: Make, value: object) -> None:
    allowed = f"simulation.batch_clients = {value!r}: give a number of at least 1, auto or off"
    with pytest.raises(ConfigError, match=f"^{re.escape(allowed)}$"):
        text_config(simulation__batch_clients=value)
    assert text_config(simulation__batch_clients="8").simulation.batch_clients == 8
