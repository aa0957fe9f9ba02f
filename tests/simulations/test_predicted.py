"""The predicted peak of a worker against what a process takes, and what moves it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.config import RunConfig, nest, resolve
from fedpeft.resident import Resident
from fedpeft.simulations.plan import plan
from fedpeft.simulations.predicted import LOGITS, predict
from fedpeft.simulations.simulate import simulate
from fedpeft.tasks import heads

Make = Callable[..., RunConfig]


def test_a_tiny_llama_takes_what_is_predicted_and_the_record_says_so(
    tiny_llama: Path, pairs_jsonl: Path, tmp_path: Path
) -> None:
    start: dict[str, object] = {"model.name": str(tiny_llama), "data.source": str(pairs_jsonl), "adapter.rank": 2}
    own = {"data.completion": "completion", "federation.clients": 2, "federation.rounds": 1, "train.local_steps": 1}
    config = resolve([nest({**start, **own, "simulation.workers": 0})])
    predicted = predict(config)
    assert predicted is not None
    words = [f"{key}={value}" for key, value in {**start, **own}.items()]
    command = [sys.executable, "-m", "fedpeft", "simulate", "--out", str(tmp_path / "run"), "--workers", "0", *words]
    subprocess.run(command, check=True, capture_output=True)  # this process has held other models
    peak = json.loads((tmp_path / "run" / "environment.json").read_text())["peak_memory"]
    assert peak["measured"] is True
    assert 0.8 < predicted.total / (peak["own"] + peak["shared"]) < 1.2


def test_checkpointing_and_smaller_batches_take_less_and_private_rows_more(text_config: Make) -> None:
    def working(**settings: object) -> int:
        found = predict(text_config(run__evaluate_batch_size=1, train__batch_size=8, **settings), trained=1000)
        assert found is not None
        return found.working

    plain = working()
    assert working(train__gradient_checkpointing=True) < plain
    assert working(data__max_length=32) < plain
    assert working(privacy__level="record", privacy__noise_multiplier=1.0) > 2 * plain - 2**20


def test_what_is_held_of_each_trained_number_follows_from_the_optimiser(text_config: Make) -> None:
    def adapter(**settings: object) -> int:
        found = predict(text_config(**settings), trained=10**6)
        assert found is not None
        return found.adapter

    of = {name: adapter(train__optimizer=name) for name in ("sgd", "adafactor", "adamw-8bit", "lion", "adamw")}
    assert of["sgd"] == of["adafactor"] == 8 * 10**6  # itself and its gradient
    assert of["adamw-8bit"] - of["sgd"] == 2 * 10**6
    assert of["lion"] - of["sgd"] == 4 * 10**6
    assert of["adamw"] - of["sgd"] == 8 * 10**6
    assert adapter(train__proximal_mu=0.1) - of["adamw"] == 4 * 10**6


def test_a_model_that_computes_all_logits_at_once_is_said_and_predicted_to_take_them(
    tiny_llama: Path, pairs_jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {"model.name": str(tiny_llama), "data.source": str(pairs_jsonl), "data.completion": "completion"}
    config = resolve([nest({**start, "adapter.rank": 2, "federation.clients": 2, "simulation.workers": 0})])
    monkeypatch.setattr("fedpeft.simulations.predicted.LOGITS", 1000)
    monkeypatch.setattr("fedpeft.simulations.plan.resident", Resident)  # whose own would remember
    blocks = plan(config)
    monkeypatch.setattr(heads, "_gives", lambda *_: False)
    whole = plan(config)
    said = [note for note in whole.notes if "logits of all positions are computed at once" in note]
    assert len(said) == 1
    assert not any("logits" in note for note in blocks.notes)
    assert blocks.memory is not None
    assert whole.memory is not None
    assert whole.memory.training > blocks.memory.training


def test_a_dry_run_tells_the_prediction_and_nothing_of_rows_where_they_are_private(text_config: Make) -> None:
    found = plan(text_config(data__max_length=100))
    assert found.memory is not None
    facts = found.to_dict()["memory"]
    assert facts["total"] == facts["libraries"] + facts["weights"] + facts["adapter"] + max(
        facts["training"], facts["scoring"]
    )
    level = {"privacy__level": "client", "privacy__noise_multiplier": 1.0, "strategy__name": "fedit"}
    private = plan(text_config(data__max_length=100, **level))
    assert private.memory is not None
    assert private.memory.training > found.memory.training  # of rows as long as allowed, not as they are
    assert private.measured is None


def test_of_a_private_run_no_memory_is_on_record(text_config: Make, tmp_path: Path) -> None:
    settings = {"federation__rounds": 1, "simulation__workers": 0, "privacy__noise_multiplier": 1.0}
    simulate(text_config(privacy__level="client", strategy__name="fedit", **settings), tmp_path / "run")
    assert "peak_memory" not in json.loads((tmp_path / "run" / "environment.json").read_text())


def test_it_knows_the_size_of_a_block_of_logits() -> None:
    assert LOGITS == heads.BLOCK_BYTES
