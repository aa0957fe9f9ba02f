from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from fedpeft.allocation import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for step in range(12):
    held = [torch.ones(1 << 18) for _ in range(32)]  # 1 MB each
    del held
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_a_step_finds_the_memory_that_the_one_before_it_freed() -> None:
    faults = {}
    fixed = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # as malloc begins; it may learn by itself, now and then
    for word in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, word], capture_output=True, text=True, check=True, env=os.environ | fixed
        )
        faults[word] = int(done.stdout)
    pages = 32 * 2**20 // resource.getpagesize()
    assert faults["keep"] < pages / 10 < faults["leave"]
