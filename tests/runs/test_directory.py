from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedpeft.config import nest, resolve
from fedpeft.errors import RunDirectoryError
from fedpeft.runs import (
    RunDirectory,
    RunLock,
    checkpoint_rounds,
    default_directory,
    folder_name,
    read_checkpoint,
    read_config,
    read_events,
    read_object,
)
from fedpeft.runs.lock import is_held

CONFIG = resolve([nest({"run.seed": 3, "strategy.name": "fedit"})])
Usage = namedtuple("Usage", "total used free")


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_folder_exists_at_once_and_reads_back(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000, {"preset": "x"})
    directory.append({"event": "evaluate", "round": 0})
    assert read_config(directory.path) == CONFIG
    assert read_events(directory.path) == [{"event": "evaluate", "round": 0}]
    facts = json.loads((directory.path / "environment.json").read_text())
    assert facts["seed"] == 3
    assert facts["preset"] == "x"
    assert facts["packages"]["torch"] == torch.__version__


def test_a_folder_that_holds_a_run_or_anything_else_is_refused_untouched(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", CONFIG, 1000)
    before = (tmp_path / "run" / "environment.json").read_bytes()
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory(tmp_path / "run", CONFIG, 1000)
    assert (tmp_path / "run" / "environment.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not an empty folder"):
        RunDirectory(tmp_path / "other", CONFIG, 1000)
    with pytest.raises(RunDirectoryError, match="not an empty folder"):
        RunDirectory(tmp_path / "other" / "thesis.txt", CONFIG, 1000)
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        read_config(tmp_path / "other")


def test_too_little_space_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**6))
    with pytest.raises(RunDirectoryError, match="1 MB free, and the run may write 517 MB"):
        RunDirectory(tmp_path / "run", CONFIG, 100_000_000)


def test_events_survive_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000)
    directory.append({"event": "round", "round": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        directory.append({"event": "round", "round": 2})
        directory.append({"event": "round", "round": 3})
    assert [problem.startswith("cannot write metrics.jsonl") for problem in directory.take_problems()] == [True]
    directory.append({"event": "round", "round": 4})
    assert [event["round"] for event in read_events(directory.path)] == [1, 2, 3, 4]


def test_a_disk_that_takes_half_a_line_keeps_none_of_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000)
    directory.append({"event": "round", "round": 1})
    before, limits = directory.events_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 10, limits[1]))
    try:
        directory.append({"event": "round", "round": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (directory.path / "metrics.jsonl").stat().st_size == before
    assert directory.events_size > before
    directory.append({"event": "round", "round": 3})
    assert [event["round"] for event in read_events(directory.path)] == [1, 2, 3]


def test_a_checkpoint_that_does_not_fit_is_skipped_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000)
    directory.checkpoint(5, {"x": torch.ones(3)}, {"strategy": "fedit"})
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        directory.checkpoint(10, {"x": torch.ones(3)}, {})
        directory.checkpoint(15, {"x": torch.ones(3)}, {})
    (problem,) = directory.take_problems()  # not one a round
    assert problem.startswith("no checkpoint of round 10: ")
    assert [path.name for path in (directory.path / "checkpoints").iterdir()] == ["round-0005"]


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000)
    for server_round in (5, 10, 15):
        directory.checkpoint(server_round, {"x": torch.full((2,), float(server_round))}, {"strategy": "fedit"})
    kept = sorted(path.name for path in (directory.path / "checkpoints").iterdir())
    assert kept == ["round-0010", "round-0015"]
    assert json.loads((directory.path / "checkpoints/round-0015/state.json").read_text())["round"] == 15


def test_the_final_adapter_takes_the_reserved_space_then_that_of_all_checkpoints_but_the_newest(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 5000)
    reserved = directory.path / ".reserved"
    assert reserved.stat().st_blocks * 512 >= 10_000
    for server_round in (5, 10):
        directory.checkpoint(server_round, {"x": torch.ones(3)}, {})
    tries = []

    def save(path: Path) -> None:
        tries.append(path)
        assert not reserved.exists()
        if len(tries) == 1:
            full()
        path.mkdir()

    directory.write_adapter(save)
    assert len(tries) == 2
    assert checkpoint_rounds(directory.path) == [10]


def test_an_adapter_that_does_not_fit_says_how_to_go_on_and_leaves_the_newest_checkpoint(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 5000)
    directory.checkpoint(5, {"x": torch.ones(3)}, {})
    with pytest.raises(RunDirectoryError, match=r"make room, and go on with: fedpeft simulate --resume .*run"):
        directory.write_adapter(full)
    assert read_checkpoint(directory.path, 5).round == 5


def test_a_checkpoint_that_does_not_fit_takes_the_space_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000)
    for server_round in (1, 2):
        directory.checkpoint(server_round, {"x": torch.ones(3)}, {})
    true_save, tries = safetensors.torch.save_file, list[Path]()

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        tries.append(path)
        if len(tries) == 1:
            full()
        true_save(tensors, path)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    assert directory.checkpoint(3, {"x": torch.ones(3)}, {}) == [2, 3]
    assert directory.take_problems() == []


def test_a_run_that_goes_on_cuts_what_came_after_the_checkpoint_half_lines_too(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000)
    directory.append({"event": "round", "round": 1})
    events = directory.events_size
    for server_round in (1, 2):
        directory.checkpoint(server_round, {"x": torch.ones(3)}, {})
    directory.append({"event": "round", "round": 2})
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "rou')
    directory.close()
    more = resolve([nest({"federation.rounds": 40})])
    with RunLock(directory.path) as lock:
        RunDirectory(directory.path, more, 1000, lock=lock).go_on(more, 1, events)
    assert read_events(directory.path) == [{"event": "round", "round": 1}]
    assert read_config(directory.path).federation.rounds == 40
    assert checkpoint_rounds(directory.path) == [1]
    (resume,) = json.loads((directory.path / "environment.json").read_text())["resumes"]
    assert (resume["round"], resume["rounds"]) == (1, 40)
    assert resume["machine"]["cores"]


def test_one_process_writes_into_a_run_directory(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000)
    with pytest.raises(RunDirectoryError, match=f"is being written by process {os.getpid()}; wait for it or end it"):
        RunLock(directory.path)
    assert is_held(directory.path)
    directory.close()
    assert is_held(directory.path) is False
    with RunLock(directory.path):
        assert is_held(directory.path)


def test_whoever_looks_whether_a_run_goes_on_does_not_keep_it_from_beginning(tmp_path: Path) -> None:
    RunLock(tmp_path).release()
    looking = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, [looking]).start()
    with RunLock(tmp_path):
        assert is_held(tmp_path)


def test_a_process_that_is_gone_or_has_let_go_is_not_named_as_the_writer(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    RunLock(tmp_path).release()
    for left in ("", f"{gone.pid}\n", "-1", "9" * 30):
        (tmp_path / ".lock").write_text(left)
        looking = os.open(tmp_path / ".lock", os.O_RDONLY)
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(RunDirectoryError, match="is being written by another process; wait"):
            RunLock(tmp_path)
        os.close(looking)


def test_what_is_left_of_a_run_that_was_killed_before_it_was_one_is_no_hindrance(tmp_path: Path) -> None:
    for name in (".lock", ".config.toml", "environment.json"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path, CONFIG, 1000).close()
    assert not (tmp_path / ".reserved").exists(), "space is reserved for nobody"


def test_a_file_of_the_users_that_is_called_like_one_of_a_run_is_not_taken_for_its_rest(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("theirs")
    with pytest.raises(RunDirectoryError, match="is not an empty folder"):
        RunDirectory(tmp_path, CONFIG, 1000)
    assert (tmp_path / "environment.json").read_text() == "theirs"


def test_events_and_facts_that_no_run_wrote_are_passed_over(tmp_path: Path) -> None:
    for harmful in ("[" * 200_000, '{"a":' * 100_000, '{"round": ' + "9" * 5000 + "}"):
        (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n' + harmful + "\n")
        assert read_events(tmp_path) == [{"round": 1}]
        (tmp_path / "environment.json").write_text(harmful)
        assert read_object(tmp_path / "environment.json") == {}


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG, 1000)
    directory.append({"event": "round", "round": 1})
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "rou')
    assert read_events(directory.path) == [{"event": "round", "round": 1}]


def test_runs_are_named_by_run_name_else_by_strategy_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_directory(resolve([nest({"run.name": "mine"})])) == Path("runs/mine")
    first = default_directory(CONFIG)
    assert first.name.startswith("fedit-")
    monkeypatch.setattr("time.strftime", lambda form: first.name.removeprefix("fedit-"))
    first.mkdir(parents=True)
    assert default_directory(CONFIG).name == f"{first.name}-2"


@pytest.mark.parametrize(
    ("client", "folder"),
    [("0", "0"), ("Zürich 2", "Zürich 2"), ("a/b", "a%2Fb"), ("../../x", "..%2F..%2Fx"), ("..", "%2E%2E")],
)
def test_a_clients_id_is_never_a_path(client: str, folder: str) -> None:
    assert folder_name(client) == folder
    assert Path(folder).name == folder
