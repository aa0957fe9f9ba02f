from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fedpeft.training import hidden_states
from fedpeft.training.hidden_states import IN_USE, HiddenStates, default_limit


def states(number: int, tokens: int = 3) -> Tensor:
    return torch.full((tokens, 4), float(number))


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def filled(folder: Path, numbers: range, limit: float | None = None) -> HiddenStates:
    held = HiddenStates(folder, limit)
    for number in numbers:
        held.put(key(number), states(number, 2 + number))
    return held


def test_what_one_process_has_written_another_one_maps(tmp_path: Path) -> None:
    other = HiddenStates(tmp_path / "a")
    one = filled(tmp_path / "a", range(5))
    other.refresh()
    assert other.get(key(1)) is None  # not written yet
    one.publish()
    other.refresh()
    for held in (one, other):
        for number in range(5):
            found = held.get(key(number))
            assert found is not None
            assert torch.equal(found, states(number, 2 + number))
    assert one.waiting == 0
    assert not one.full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    one, row = HiddenStates(tmp_path / "a"), torch.randn(7, 5).to(dtype)
    one.put(key(1), row)
    one.publish()
    other = HiddenStates(tmp_path / "a")
    other.refresh()
    found = other.get(key(1))
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, row)


def test_a_file_is_written_as_soon_as_there_is_enough_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "FILE_BYTES", 200)
    filled(tmp_path / "a", range(10))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    code = """
import sys
import torch
from pathlib import Path
from fedpeft.training import hidden_states
hidden_states.FILE_BYTES = 1000
held = hidden_states.HiddenStates(Path(sys.argv[1]))
for number in map(int, sys.argv[2:]):
    held.refresh()
    held.put(number.to_bytes(16, "big"), torch.full((3, 4), float(number)))
held.publish()
"""
    shares = [range(60), range(40, 100)]
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    writers = [subprocess.Popen([*command, *map(str, share)]) for share in shares]
    assert [writer.wait() for writer in writers] == [0, 0]
    held = HiddenStates(tmp_path / "a")
    held.refresh()
    for number in range(100):
        found = held.get(key(number))
        assert found is not None
        assert torch.equal(found, states(number))


def test_a_writer_that_is_killed_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os, signal, sys
import torch
from pathlib import Path
from types import SimpleNamespace
from fedpeft.training import hidden_states
held = hidden_states.HiddenStates(Path(sys.argv[1]))
held.put(bytes(16), torch.zeros(3, 4))
hidden_states.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
held.publish()
"""
    folder = tmp_path / "a"
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -signal.SIGKILL
    assert len(list(folder.glob("*.draft"))) == 1  # it had got as far as that
    monkeypatch.setattr(hidden_states, "STALE", -1.0)
    held = HiddenStates(folder)
    held.refresh()
    assert held.get(bytes(16)) is None
    held.put(bytes(16), states(0))
    held.publish()  # whose lock the dead does not hold
    assert held.get(bytes(16)) is not None
    assert not list(folder.glob("*.draft"))


def test_a_damaged_file_holds_no_rows(tmp_path: Path) -> None:
    filled(tmp_path / "a", range(3)).publish()
    (file,) = (tmp_path / "a").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    held = HiddenStates(tmp_path / "a")
    held.refresh()
    assert held.get(key(0)) is None


def test_nothing_is_kept_beyond_the_limit(tmp_path: Path) -> None:
    held = filled(tmp_path / "a", range(4), limit=2000)
    held.publish()
    assert not held.full
    for number in range(4, 60):
        held.put(key(number), states(number, 2 + number))
    held.publish()
    assert held.full
    assert held.get(key(2)) is not None
    assert held.get(key(40)) is None
    held.put(key(70), states(1))
    assert held.waiting == 0
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 2000


def test_states_that_nobody_uses_make_room_and_those_in_use_do_not(tmp_path: Path) -> None:
    for name in ("old", "used"):
        filled(tmp_path / name, range(9)).publish()
    os.utime(tmp_path / "old" / IN_USE, (0, 0))
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    one = filled(tmp_path / "new", range(9), limit=held)
    one.publish()
    assert not one.full
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "used").exists()
    two = filled(tmp_path / "newer", range(9), limit=held)
    two.publish()
    assert two.full
    assert (tmp_path / "used").exists()


def test_a_nearly_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "RESERVE", 2**62)
    held = filled(tmp_path / "a", range(2))
    held.publish()
    assert held.full
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no folder")
    held = filled(tmp_path / "a" / "b", range(2))
    held.publish()
    assert held.full
    assert held.get(key(0)) is None


def test_by_default_a_fifth_of_the_free_disk_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states.shutil, "disk_usage", lambda _: SimpleNamespace(free=4e9))
    assert default_limit(tmp_path / "not" / "yet") == pytest.approx(0.8e9)
    assert default_limit(tmp_path, 200e9) == 10e9
