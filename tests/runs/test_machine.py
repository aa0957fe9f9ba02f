from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedpeft.runs import machine
from fedpeft.runs.machine import Footprint, footprint, gpus_in, usable_cores, usable_memory

GIB = 2**30
PROC = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"}
TABLE = """\
0, GPU-aaaa-1, NVIDIA H100 80GB HBM3, 81559, 80000, 550.54.15
1, GPU-bbbb-2, NVIDIA L4, 23034, [N/A], 550.54.15
"""


def system(folder: Path, files: dict[str, str]) -> Path:
    """Write files of the systems ``proc`` and ``sys``."""
    for name, text in (PROC | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2),
        # the outer group's quota counts too, and less than a core is one
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            },
            1,
        ),
        # a container that is told a path of its host's
        ({"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_cores_are_those_that_a_containers_quota_leaves(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    found, limit = usable_cores(system(tmp_path, files))
    assert found == cores
    assert (limit is None) == (cores == 8)


def test_cores_are_those_that_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 6})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores(system(tmp_path, {})) == (3, "its affinity leaves 3 of 8 cores")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (16 * GIB, 8 * GIB)),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max"}, (16 * GIB, 8 * GIB)),
        # what is cached of files is given back when memory is asked for
        (
            {
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/memory.max": str(4 * GIB),
                "sys/fs/cgroup/a/memory.current": str(3 * GIB),
                "sys/fs/cgroup/a/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
            },
            (4 * GIB, 3 * GIB),
        ),
        (
            {
                "proc/self/cgroup": "3:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(2 * GIB),
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            (2 * GIB, GIB),
        ),
    ],
)
def test_memory_is_what_a_containers_limit_leaves(
    tmp_path: Path, files: dict[str, str], expected: tuple[int, int]
) -> None:
    memory, free, limit = usable_memory(system(tmp_path, files))
    assert (memory, free) == expected
    assert (limit is None) == (memory == 16 * GIB)


def test_of_the_gpus_that_the_driver_knows_those_that_are_visible_count() -> None:
    both = gpus_in(TABLE, None)
    assert [gpu.name for gpu in both] == ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]
    assert (both[0].memory, both[0].free, both[0].driver) == (81559 * 2**20, 80000 * 2**20, "550.54.15")
    assert both[1].free == 0
    assert gpus_in(TABLE, "1,0") == (both[1], both[0])
    assert gpus_in(TABLE, "GPU-bbbb") == (both[1],)
    assert gpus_in(TABLE, "") == gpus_in(TABLE, "7,0") == gpus_in("No devices were found", None) == ()


def test_gpus_of_which_the_driver_says_nothing_are_named_by_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    assert [(gpu.name, gpu.free) for gpu in machine.visible_gpus()] == [("card 0", 0), ("card 1", 0)]
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{TABLE}END\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.visible_gpus() == gpus_in(TABLE, None)


def test_a_process_that_has_taken_and_given_back_memory_is_measured_at_its_peak() -> None:
    before = footprint()
    taken = bytearray(300 * 2**20)
    taken[:: 2**12] = b"x" * len(taken[:: 2**12])
    del taken
    assert footprint().own > before.own or before.own > 300 * 2**20  # unless the peak so far was above
    assert footprint().measured


def test_what_a_process_shares_with_others_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = "VmHWM: {} kB\nRssAnon: 600 kB\nRssFile: 300 kB\nRssShmem: 100 kB\n"
    (tmp_path / "status").write_text(status.format(1000))
    (tmp_path / "smaps_rollup").write_text("Rss: 1000 kB\nShared_Dirty: 200 kB\nPrivate_Dirty: 400 kB\n")
    monkeypatch.setattr(machine, "PROCESS", tmp_path)
    meter = machine._Meter()
    assert meter.read() == Footprint(400 * 1024, 600 * 1024)
    # a peak that is hardly higher is not worth a closer look, and one that is higher is
    (tmp_path / "smaps_rollup").unlink()
    (tmp_path / "status").write_text(status.format(1010))
    assert meter.read() == Footprint(400 * 1024, 600 * 1024)
    (tmp_path / "status").write_text(status.format(2000))
    assert meter.read() == Footprint(1600 * 1024, 400 * 1024)


def test_gpu_memory_is_what_torch_has_reserved_and_the_context_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert footprint().gpu == 0
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 * GIB)
    assert footprint().gpu == 5 * GIB + machine.CUDA_CONTEXT


def test_of_two_footprints_the_larger_counts_number_by_number() -> None:
    assert Footprint(3, 1, 0) | Footprint(2, 5, 7, measured=False) == Footprint(3, 5, 7, measured=False)
