from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.config import RunConfig
from fedpeft.errors import RunDirectoryError
from fedpeft.report.runs import runs_table
from fedpeft.runs import Checkpoint, RunLock
from fedpeft.runs.checkpoints import checkpoint_folder, write_checkpoint
from fedpeft.runs.listing import list_runs
from tests.report.printing import printed

Events = Callable[..., list[dict[str, Any]]]
Config = Callable[..., RunConfig]
Maker = Callable[..., Path]


def test_runs_are_listed_with_method_rounds_state_and_scores(
    run_directory: Maker, config: Config, events: Events
) -> None:
    run = run_directory(config(strategy__name="fedit", data__source="preset:digits"), events(4))
    run_directory(config(federation__rounds=9), events(2, reason="interrupted"), "second")
    run_directory(config(), events(1, reason="round 2: nobody answered"), "third")
    found = {facts["name"]: facts for facts in list_runs(run.parent)}
    assert json.loads(json.dumps(found)) == found
    assert found["first"] | {"started": None} == {
        "name": "first", "path": str(run), "state": "completed", "strategy": "fedit", "task": "sequence-classification",
        "preset": "digits", "rounds": 4, "planned": 4, "metric": "accuracy", "first": 0.25, "last": 0.75,
        "started": None, "problem": None, "level": None, "epsilon": None, "guarantee": None,
        "resumable": None,
    }  # fmt: skip
    assert {name: (facts["state"], facts["rounds"], facts["planned"]) for name, facts in found.items()} == {
        "first": ("completed", 4, 4), "second": ("interrupted", 2, 9), "third": ("stopped", 1, 4),
    }  # fmt: skip


def test_a_run_without_an_end_is_running_until_it_has_been_silent_for_long(
    run_directory: Maker, config: Config, events: Events
) -> None:
    run = run_directory(config(), events(1, reason=None))
    written = (run / "metrics.jsonl").stat().st_mtime
    assert list_runs(run.parent, clock=lambda: written + 60)[0]["state"] == "running"
    assert list_runs(run.parent, clock=lambda: written + 1e5)[0]["state"] == "abandoned"


def test_foreign_folders_are_passed_over_and_broken_runs_are_listed_with_the_reason(
    run_directory: Maker, config: Config, events: Events
) -> None:
    folder = run_directory(config(), events(4)).parent
    (folder / "notes").mkdir()
    (folder / "file.txt").write_text("not a run")
    run_directory(config(), [], "empty")
    (run_directory(config(), [], "binary") / "metrics.jsonl").write_bytes(b"\xff\xfe")
    (run_directory(config(), [], "broken") / "config.toml").write_text("[model\n")
    (run_directory(config(), [], "old") / "config.toml").write_text("[model]\nshape = 3\n")
    (run_directory(config(), [], "odd") / "metrics.jsonl").write_text('5\n{"event": "round"}\n')
    found = {facts["name"]: facts for facts in list_runs(folder)}
    assert found.keys() == {"first", "empty", "binary", "broken", "old", "odd"}
    assert {name for name, facts in found.items() if facts["state"] == "unreadable"} == {"binary", "broken", "old"}
    assert "model.shape" in found["old"]["problem"]
    assert (found["empty"]["rounds"], found["empty"]["first"]) == (0, None)


def test_runs_are_in_the_order_in_which_they_were_started(run_directory: Maker, config: Config) -> None:
    for name, started in (("b", 3000), ("a", 9000), ("c", 6000)):
        os.utime(run_directory(config(), [], name) / "config.toml", (started, started))
    folder = run_directory(config(), [], "d").parent
    assert [facts["name"] for facts in list_runs(folder)] == ["b", "c", "a", "d"]


def test_one_run_directory_lists_itself(run_directory: Maker, config: Config, events: Events) -> None:
    run = run_directory(config(), events(4))
    assert [facts["name"] for facts in list_runs(run)] == ["first"]


def test_no_runs_yet_is_no_error_but_a_folder_that_does_not_exist_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list_runs(Path("runs")) == []
    with pytest.raises(RunDirectoryError, match="rusn"):
        list_runs(Path("rusn"))


def test_what_can_be_resumed_is_told_with_the_round_and_a_lock_tells_who_runs(
    run_directory: Maker, config: Config, events: Events
) -> None:
    run = run_directory(config(), events(2, reason=None))
    (run / "environment.json").write_text('{"simulated": true}')
    for server_round in (1, 2):
        write_checkpoint(run, Checkpoint(server_round, {"x": torch.ones(1)}, {}))
    (checkpoint_folder(run, 2) / "state.json").unlink()
    with RunLock(run):
        assert [(facts["state"], facts["resumable"]) for facts in list_runs(run)] == [("running", None)]
    assert [(facts["state"], facts["resumable"]) for facts in list_runs(run)] == [("abandoned", 1)]
    assert "resumable at round 1" in printed(runs_table(list_runs(run), run))
    (run / "environment.json").write_text("{}")  # of a deployment
    assert list_runs(run)[0]["resumable"] is None
