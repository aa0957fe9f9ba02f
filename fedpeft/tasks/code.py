"""Python code that a model wrote, run against its tests in a process of its own.

This is no sandbox. The process gets an empty folder, no environment, and limits of time, memory and file size, which
stop accidents: endless loops, and memory or disks that fill up. Code that means harm can read files that its user can
read, and use the network. That is why nothing is run without ``run.execute_code=true``.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10  # of wall time, and of processor time
MEMORY = 1 << 30  # bytes of addresses
FILE_SIZE = 1 << 24
LAUNCH = """
import resource, runpy, sys
seconds, memory, size = map(int, sys.argv[2:])
limits = {"CPU": seconds, "AS": memory, "FSIZE": size, "CORE": 0}
for name, most in limits.items():
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
runpy.run_path(sys.argv[1], run_name="__main__")
"""
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def code_in(answer: str) -> str:
    """Return the code of an answer: its first fenced block, or all of it where there is none."""
    found = FENCE.search(answer)
    return found[1] if found is not None else answer


def passes(answer: str, tests: str, seconds: float = SECONDS) -> bool:
    """Tell whether the code of an answer, and then its tests, run to their end without an exception.

    Parameters
    ----------
    answer : str
        What the model wrote.
    tests : str
        Python code, such as ``assert double(2) == 4``.
    seconds : float
        How long both may take together.
    """
    # what is printed last tells an end from sys.exit(0) half-way
    word = os.urandom(16).hex()
    program = f"{code_in(answer)}\n\n{tests}\n\nprint({word!r})\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        with (Path(folder) / "printed").open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", LAUNCH, str(path), *map(str, (SECONDS, MEMORY, FILE_SIZE))],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):  # and whatever it has started
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return code == 0 and (Path(folder) / "printed").read_bytes().rstrip().endswith(word.encode())
