from __future__ import annotations

import fcntl
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from fedpeft.errors import ConfigError
from fedpeft.simulations.grids import cluster

MIB = 2**20


@pytest.mark.parametrize(
    ("free", "size"),
    [(8192 * MIB, 2048 * MIB), (1000 * MIB, 900 * MIB), (64 * MIB, 2048 * MIB)],
)
def test_the_store_fits_shared_memory_or_goes_to_files_where_that_is_tiny(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int, size: int
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 64 * MIB, "SC_PAGE_SIZE": 4096}[name])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert cluster.default_store_bytes() == size
    assert bool(caplog.records) == (free < size)


def test_the_store_takes_a_third_of_a_small_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": MIB // 2, "SC_PAGE_SIZE": 4096}[name])
    assert cluster.default_store_bytes() < 2048 * MIB / 3


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "claim"),
    [
        ([8.0], 4, 2, 0),
        ([4.0, 4.0], 4, 2, 2),
        ([4.0, 4.0], 6, 2, 1),
        ([1.0, 1.0], 6, 1, 0),
        ([3.0, 3.0], 3, 2, 1),  # two of two threads find a place, not three
        ([0.0, 4.0], 4, 1, 1),
    ],
)
def test_workers_claim_as_many_cpus_as_leave_room_for_all(
    monkeypatch: pytest.MonkeyPatch, cores: list[float], workers: int, threads: int, claim: float
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": count}} for count in cores]
    dead = {"Alive": False, "Resources": {"CPU": 99.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, dead])
    assert cluster.cpus_per_worker(workers, threads) == claim
    if len(cores) == 1:
        assert cluster.cpus_per_worker(workers, threads, grows=True) == threads  # as on more nodes


@pytest.mark.parametrize(("cpus", "claim"), [(1.0, 0), (2.0, 1)])
def test_workers_with_gpus_claim_cpus_only_where_the_nodes_with_gpus_have_them(
    monkeypatch: pytest.MonkeyPatch, cpus: float, claim: float
) -> None:
    nodes = [{"Alive": True, "Resources": held} for held in ({"CPU": 64.0}, {"CPU": cpus, "GPU": 1.0})]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster.cpus_per_worker(2, 1, 0.5) == claim


def test_gpus_that_ray_does_not_have_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"gpus_per_worker = 0.5 with 2 workers needs 1 GPUs, and Ray sees 0"):
        cluster.check_gpus(2, 0.5)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    cluster.check_gpus(2, 0.5)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked"))
        with (
            pytest.raises(ConfigError, match=r"RAY_ADDRESS = .*refused"),
            cluster.ray_connection(),
        ):
            pass


def test_the_configurations_address_goes_before_the_environments_and_is_named_where_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked"))
    with (
        pytest.raises(ConfigError, match=r"simulation\.address = '127\.0\.0\.1:1' cannot be connected to"),
        cluster.ray_connection(address="127.0.0.1:1"),
    ):
        pass


def test_folders_that_a_killed_process_left_are_removed_and_those_in_use_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    left, held, fresh = (tmp_path / f"{cluster.PREFIX}{name}" for name in ("left", "held", "fresh"))
    for folder in (left, held, fresh):
        folder.mkdir()
    (left / cluster.LOCK).touch()
    with (held / cluster.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with cluster._own_directory() as inner:
            own = inner.parent
            assert own.stat().st_mode & 0o077 == 0, "others may look in"
            assert {path.name for path in tmp_path.iterdir()} == {own.name, held.name, fresh.name}
            with cluster._own_directory():
                assert own.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {held.name, fresh.name}


def test_a_folder_that_somebody_else_has_put_there_is_neither_entered_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    victim = tmp_path / "victim"
    elsewhere, linked, piped, opened, foreign = (
        tmp_path / "tmp" / f"{cluster.PREFIX}{name}" for name in ("elsewhere", "linked", "piped", "opened", "foreign")
    )
    victim.mkdir()
    (victim / "kept").write_text("words")
    (victim / cluster.LOCK).write_text("words")
    for folder in (linked, piped, opened, foreign):
        folder.mkdir(parents=True)
    elsewhere.symlink_to(victim)
    (linked / cluster.LOCK).symlink_to(victim / "kept")
    os.mkfifo(piped / cluster.LOCK)
    for folder in (opened, foreign):
        (folder / cluster.LOCK).touch()
    opened.chmod(0o777)
    plain = os.lstat

    def lstat(path: object, **others: Any) -> Any:
        found = plain(path, **others)  # type: ignore[call-overload]
        return SimpleNamespace(st_mode=found.st_mode, st_uid=found.st_uid + 1) if path == foreign else found

    monkeypatch.setattr(os, "lstat", lstat)
    with cluster._own_directory():
        pass
    monkeypatch.undo()
    assert {(victim / name).read_text() for name in ("kept", cluster.LOCK)} == {"words"}
    assert {path.name for path in (tmp_path / "tmp").iterdir()} == {
        path.name for path in (elsewhere, linked, piped, opened, foreign)
    }
