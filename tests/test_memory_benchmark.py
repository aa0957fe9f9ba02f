"""What the memory benchmark reads and computes, without a run."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from benchmarks import memory
from benchmarks.memory import Peak


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of the pages")
def test_the_memory_of_a_process_is_the_sum_of_its_parts_and_that_of_a_dead_one_is_nothing() -> None:
    held = memory.usage(os.getpid())
    assert held["own"] > 10e6
    assert held["all"] == pytest.approx(held["own"] + held["files"] + held["shared"], rel=0.01)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert memory.usage(child.pid) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of the pages")
def test_a_run_is_its_command_with_all_descendants_by_what_they_are_for() -> None:
    code = "import ray._raylet as r, time; r.setproctitle('ray::Worker.answer'); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = memory.look(psutil.Process())
        child.kill()
    assert found["driver"]["own"] > 10e6
    assert found["workers"]["own"] > 10e6


def test_two_workers_are_compared_with_one_of_the_same_preset_and_precision() -> None:
    totals = [("a", "fp32", 1, 100), ("a", "fp32", 2, 120), ("a", "bf16", 2, 500), ("b", "fp32", 2, 90)]
    totals += [("b", "fp32", 1, 60), ("b", "fp32", 0, 40)]
    peaks = [Peak(preset, precision, workers, total) for preset, precision, workers, total in totals]
    assert memory.ratios(peaks) == {"a fp32": 1.2, "b fp32": 1.5}
