"""Locks, and folders that appear whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedpeft.cache import cache_dir, locked, publishing
from fedpeft.errors import DataError


def test_the_environment_names_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FEDPEFT_CACHE_DIR")
    assert cache_dir().name == "fedpeft"


def test_a_folder_appears_when_it_is_complete_and_replaces_what_stood_there(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "entry"
    with publishing(folder) as draft:
        (draft / "a").write_text("1")
        assert not folder.exists()
    assert (folder / "a").read_text() == "1"
    with publishing(folder) as draft:
        (draft / "b").write_text("2")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in folder.parent.iterdir()] == ["entry"]


def test_a_failed_or_killed_writer_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    with publishing(folder) as draft:
        (draft / "a").write_text("1")
    (tmp_path / "entry.tmp-of-a-killed-process").mkdir()
    with pytest.raises(UnicodeEncodeError), publishing(folder) as draft:
        (draft / "a").write_text("2\ud800", encoding="utf-8")
    assert (folder / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_one_holder_of_a_lock_at_a_time(tmp_path: Path) -> None:
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with locked(tmp_path / "entry"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with locked(tmp_path / "entry"):
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_cache_that_is_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"cannot write to the cache .*FEDPEFT_CACHE_DIR"),
        locked(tmp_path / "file" / "x"),
    ):
        pass


def test_the_cache_which_holds_rows_is_closed_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path / "above" / "cache"))
    with locked(cache_dir() / "deep" / "entry"):
        assert cache_dir().stat().st_mode & 0o777 == 0o700
