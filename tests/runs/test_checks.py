from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpeft.runs import checks
from fedpeft.runs.checks import State
from fedpeft.runs.machine import Gpu, Machine

GB = 10**9
PLENTY = Machine(8, 64 * GB, 32 * GB)


@pytest.mark.parametrize(
    ("flags", "says", "advises"),
    [
        ("avx512f avx512_bf16 amx_bf16 amx_tile", "with AMX", "train.precision=bf16"),
        ("avx512f avx512_bf16", "with AVX512-BF16", "train.precision=bf16"),
        ("avx2", "without AMX or AVX512-BF16", "train.precision=fp32"),
    ],
)
def test_a_processor_without_bf16_is_told_to_stay_with_fp32(
    tmp_path: Path, flags: str, says: str, advises: str
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"model name : A 9000\nflags : fpu {flags}\n")
    found = checks.processor(PLENTY, tmp_path)
    assert says in found.seen
    assert "A 9000" in found.seen
    assert advises in found.advice


def test_products_are_timed_and_bf16_is_advised_only_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for factor, advised in ((3.0, "bf16"), (0.5, "fp32")):
        rates = {torch.float32: 80.0, torch.bfloat16: 80.0 * factor}
        monkeypatch.setattr(checks, "_rate", lambda inputs, weight, rates=rates: rates[inputs.dtype])
        found = checks.products(PLENTY)
        assert f"train.precision={advised}" in found.advice
        assert f"fp32 80, fp32 by oneDNN 80, bf16 {80 * factor:.0f}" in found.seen


def test_a_rate_counts_the_operations_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    ticks = iter([0.0, 0.1, 0.3, 0.5])  # begun, and before each product; the last one ends it
    monkeypatch.setattr(checks, "time", SimpleNamespace(thread_time=lambda: next(ticks), perf_counter=lambda: 0.0))
    rate = checks._rate(torch.zeros(2, 3), torch.zeros(4, 3))
    assert rate == pytest.approx(2 * 2e-9 * checks.ROWS * checks.INNER * checks.OUTER / 0.5)


@pytest.mark.parametrize(("free", "state"), [(16 * GB, State.OK), (2 * GB, State.SLOW), (GB // 2, State.BROKEN)])
def test_short_memory_is_slow_and_none_is_broken(free: int, state: State) -> None:
    assert checks.memory(Machine(2, 16 * GB, free)).state is state


def test_a_containers_limits_are_named() -> None:
    held = Machine(2, 4 * GB, 4 * GB, limits=("a quota leaves 2 cores", "a limit leaves 4 GB of memory"))
    assert "a quota leaves 2 cores" in checks.cores(held).seen
    assert "a limit leaves 4 GB of memory" in checks.memory(held).seen


def test_gpus_are_named_with_memory_and_driver() -> None:
    found = checks.gpus(Machine(8, GB, GB, (Gpu("NVIDIA L4", 24 * GB, 20 * GB, "550.1"),)))
    assert found.seen == "NVIDIA L4, 20 of 24 GB free, driver 550.1"


def test_more_threads_than_cores_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert checks.threads(PLENTY).state is State.SLOW
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert checks.threads(PLENTY).state is State.OK


@pytest.mark.parametrize(
    ("limits", "state", "advice"),
    [
        ((65536, 65536), State.OK, ""),
        ((1024, 65536), State.SLOW, "ulimit -n 4096"),
        ((1024, 2048), State.SLOW, "ulimit -n 2048"),
        ((256, 65536), State.BROKEN, "ulimit -n 4096"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), State.OK, ""),
    ],
)
def test_few_open_files_are_told_of_with_what_may_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], state: State, advice: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    found = checks.open_files(PLENTY)
    assert (found.state, found.advice) == (state, advice)


@pytest.mark.parametrize(("free", "state"), [(4 * GB, State.OK), (64 * 2**20, State.SLOW)])
def test_little_shared_memory_is_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, state: State) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = checks.shared_memory(PLENTY, tmp_path)
    assert found.state is state
    assert ("--shm-size=2g" in found.advice) == (state is State.SLOW)
    assert checks.shared_memory(PLENTY, tmp_path / "nowhere").state is State.SLOW


@pytest.mark.parametrize(("free", "state"), [(50 * GB, State.OK), (GB, State.SLOW), (GB // 10, State.BROKEN)])
def test_a_full_disk_is_broken_and_one_that_fills_up_is_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, state: State
) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = checks.cache_disk(PLENTY)
    assert found.state is state
    assert ("FEDPEFT_CACHE_DIR" in found.advice) == (state is not State.OK)


def test_a_cache_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert checks.cache_disk(PLENTY).state is State.BROKEN


@pytest.mark.parametrize(("mode", "total", "left", "state"), [
    ("0", 0, 0, State.OK), ("0", 8000, 7000, State.OK), ("0", 8000, 1000, State.SLOW), ("2", 0, 0, State.SLOW),
])  # fmt: skip
def test_swap_in_use_and_strict_overcommit_are_slow(
    tmp_path: Path, mode: str, total: int, left: int, state: State
) -> None:
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/overcommit_memory").write_text(f"{mode}\n")
    (tmp_path / "proc/meminfo").write_text(f"SwapTotal: {total} kB\nSwapFree: {left} kB\n")
    assert checks.swap(PLENTY, tmp_path).state is state


def test_a_library_of_a_version_that_is_not_asked_for_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.packages(PLENTY).state is State.OK
    original = importlib.metadata.version
    wrong = {"ray": "1.0", "torch": "2.13.0+cu130"}  # of which the second is a build of one that is asked for
    monkeypatch.setattr(importlib.metadata, "version", lambda name: wrong.get(name) or original(name))
    found = checks.packages(PLENTY)
    assert found.state is State.BROKEN
    assert found.seen.startswith("ray 1.0 is not ")
    assert "torch" not in found.seen


def test_every_check_answers_here_and_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.times()
    found = checks.examine()
    spent = os.times()
    assert spent.user + spent.system - before.user - before.system < 20
    assert len(found) == len(checks.CHECKS) == len({each.name for each in found})
    assert all(each.advice for each in found if each.state is not State.OK)
