"""Runs that compute what lies below their adapters once a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.cache import CACHE_VARIABLE
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError
from fedpeft.rescoring import rescore
from fedpeft.resident import _held, resident
from fedpeft.runs import Event, read_config, read_events
from fedpeft.simulations.plan import plan
from fedpeft.simulations.prefixing import decide
from fedpeft.simulations.simulate import simulate
from fedpeft.training import hidden_states
from fedpeft.training.prefix import FOLDER

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make(text_config: Make, still_bert: Path) -> Make:
    def config(**settings: object) -> RunConfig:
        usual = {"model__name": str(still_bert), "adapter__layers": "last:1", "train__local_epochs": 1}
        return text_config(**{**usual, "train__local_steps": None, "federation__rounds": 3, **settings})

    return config


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, whose small files are written at once, and no model that knows another one."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(hidden_states, "LEAST_BYTES", 1)
    _held.clear()
    return tmp_path / "cache" / FOLDER


def tensors(run: Path) -> Mapping[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    return all(
        (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )


def scores(run: Path) -> list[Any]:
    return [event["loss"] for event in read_events(run) if event["event"] == "evaluate"]


def test_a_run_keeps_states_and_learns_what_it_would_without(make: Make, states: Path, tmp_path: Path) -> None:
    notes: list[Event] = []
    kept = simulate(make(), tmp_path / "kept", listener=notes.append).path
    said = [event["message"] for event in notes if event["event"] == "note"]
    assert any("prefix cache on: the first 3 of 4 blocks run once a row" in note for note in said)
    assert read_config(kept).simulation.prefix_cache == "on"
    assert list(states.rglob("*.safetensors"))
    plain = simulate(make(simulation__prefix_cache="off"), tmp_path / "plain").path
    assert read_config(plain).simulation.prefix_cache == "off"
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(kept)[name], tensor, rtol=1e-3, atol=1e-4)
    assert scores(kept) == pytest.approx(scores(plain), rel=1e-4)
    assert rescore(kept, {})["loss"] == scores(kept)[-1]  # which takes the same way


def test_a_warm_cache_a_cold_one_and_a_full_one_give_the_same_bytes(make: Make, states: Path, tmp_path: Path) -> None:
    cold = simulate(make(), tmp_path / "cold").path
    files = {path: path.stat().st_mtime_ns for path in states.rglob("*.safetensors")}
    _held.clear()  # as in another process
    warm = simulate(read_config(cold), tmp_path / "warm").path
    assert {path: path.stat().st_mtime_ns for path in states.rglob("*.safetensors")} == files
    _held.clear()
    full = simulate(make(simulation__prefix_cache="on", simulation__prefix_cache_limit=1e-7), tmp_path / "full").path
    assert same(cold, warm)
    assert same(cold, full)
    assert scores(cold) == scores(warm) == scores(full)


def test_another_method_and_a_sweep_use_the_same_states(make: Make, states: Path, tmp_path: Path) -> None:
    simulate(make(), tmp_path / "one")
    held = sorted(states.rglob("*.safetensors"))
    for number, settings in enumerate([{"strategy__name": "flora"}, {"train__learning_rate": 0.1, "adapter__rank": 4}]):
        simulate(make(**settings), tmp_path / str(number))
    assert sorted(states.rglob("*.safetensors")) == held  # no row was computed again, and no folder is new


def test_rows_under_protection_take_the_same_way(make: Make, states: Path, tmp_path: Path) -> None:
    private = {"privacy__level": "record", "privacy__noise_multiplier": 0.5, "train__local_steps": 3}
    private |= {"train__local_epochs": None, "privacy__delta": 1e-3}
    kept = simulate(make(**private), tmp_path / "kept").path
    assert read_config(kept).simulation.prefix_cache == "on"
    plain = simulate(make(**private, simulation__prefix_cache="off"), tmp_path / "plain").path
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(kept)[name], tensor, rtol=1e-3, atol=1e-4)
    again = simulate(read_config(kept), tmp_path / "again").path
    assert same(kept, again)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"adapter__layers": None}, "the model is adapted in its first block"),
        ({"adapter__layers": "1"}, ""),
        ({"federation__rounds": 1, "train__local_steps": 1, "train__local_epochs": None}, "would be used"),
        ({"simulation__prefix_cache_limit": 1e-7}, "the states of all rows take"),
    ],
)
def test_auto_is_off_where_it_would_not_pay(make: Make, settings: dict[str, Any], why: str) -> None:
    config = make(**settings)
    decided = decide(config, resident(config))
    assert decided.on == (not why)
    assert why in decided.why


def test_dropout_below_is_a_reason_that_is_told_in_one_note(text_config: Make, tiny_bert: Path, tmp_path: Path) -> None:
    notes: list[Event] = []
    dropping = text_config(adapter__layers="last:1", train__local_steps=30, federation__rounds=2)
    run = simulate(dropping, tmp_path / "run", listener=notes.append).path
    said = [event["message"] for event in notes if "prefix cache" in str(event.get("message"))]
    assert said == ["prefix cache off: the model draws dropout below its lowest adapted block"]
    assert read_config(run).simulation.prefix_cache == "off"


def test_on_where_it_cannot_be_is_refused_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"simulation.prefix_cache = 'on': the model is adapted in its first block"):
        simulate(make(adapter__layers="first:2", simulation__prefix_cache="on"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_what_would_be_kept_and_how_much(make: Make) -> None:
    facts = plan(make()).to_dict()["prefix_cache"]
    home = resident(make())
    tokens = int(home.data.train.lengths.sum() + home.test.lengths.sum())
    assert (facts["on"], facts["blocks_below"], facts["blocks"]) == (True, 3, 4)
    assert facts["bytes"] == tokens * 16 * 4
    assert facts["limit_bytes"] > 0
    assert json.dumps(facts)
    private = plan(make(privacy__level="record", privacy__noise_multiplier=1.0, privacy__delta=1e-3))
    assert private.to_dict()["prefix_cache"]["bytes"] is None  # it would tell of rows
