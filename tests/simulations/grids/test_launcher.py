from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from fedpeft.simulations.grids import launcher


class _BecomesError(Exception):
    """What the process is now."""


@pytest.fixture(autouse=True)
def becoming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell what the launcher would become, and let nothing be imported."""

    def become(file: str, arguments: list[str]) -> None:
        raise _BecomesError(arguments)

    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(launcher, "_started", lambda *_: pytest.fail("a nursery was started"))


def becomes(folder: Path) -> list[str]:
    with pytest.raises(_BecomesError) as ended:
        launcher.main(json.dumps({"folder": str(folder), "modules": [], "variables": {}}), ["worker.py", "--a"])
    found: list[str] = ended.value.args[0]
    return found


@pytest.mark.parametrize("what", ["missing", "a file", "a link", "open to others", "another's"])
def test_a_folder_that_others_may_have_made_is_not_used_and_the_worker_begins_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    real, folder = tmp_path / "real", tmp_path / "folder"
    real.mkdir(mode=0o700)
    if what == "a file":
        folder.touch()
    elif what == "a link":
        folder.symlink_to(real)
    elif what != "missing":
        folder.mkdir(mode=0o700)
    if what == "open to others":
        folder.chmod(0o770)
    if what == "another's":
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert becomes(folder) == [sys.executable, "worker.py", "--a"]
    assert list(real.iterdir()) == []
    assert not folder.is_dir() or list(folder.iterdir()) == []


def test_whatever_the_system_refuses_stops_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)

    def refuse(*_: object) -> socket.socket:
        raise OSError(24, "too many open files")

    for name in ("_connected", "_started"):
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "_connected", lambda _: None)
            patch.setattr(launcher, name, refuse)
            assert becomes(folder) == [sys.executable, "worker.py", "--a"]
