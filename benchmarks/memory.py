"""How much memory a simulation holds at its peak, with so many workers, and what it is made of.

    python -m benchmarks.memory --preset docstrings [--precision fp32 bf16] [--workers 1,2] [--json FILE] [SETTING ...]

Each figure is a whole `fedpeft simulate` in a process of its own. Several times a second the proportional set size
(PSS: a page that several processes map counts once) of the command and of all its descendants, Ray's included, is
summed. The parts are those of the moment at which the sum was largest: ``own`` is anonymous memory, ``files`` what is
mapped from files (weights, libraries), ``shared`` is memory in /dev/shm (Ray's object store). The process that workers
are forked from counts among Ray's. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

TARGET = 1.25  # of two workers against one
INTERVAL = 0.2  # seconds between two looks
PARTS = {"Pss": "all", "Pss_Anon": "own", "Pss_File": "files", "Pss_Shmem": "shared"}
LINE = re.compile(r"(\w+): +(\d+) kB")
# enough for every worker to have trained, and for the test rows to be scored twice
SETTINGS = ("federation.rounds=2", "train.local_steps=4")

Usage = dict[str, int]  # bytes, by what of


@dataclass
class Peak:
    """The largest sum of a run, and what it was made of.

    Parameters
    ----------
    preset, precision : str
        What ran.
    workers : int
        Ray workers; 0 is one process.
    total : int
        Bytes.
    roles : dict of str to dict of str to int
        Bytes of the driver, of the workers and of Ray's own processes, each as ``all``, ``own``, ``files``, ``shared``.
    seconds : float
        Wall time of the run.
    looks : int
        How often its memory was read.
    """

    preset: str
    precision: str
    workers: int
    total: int = 0
    roles: dict[str, Usage] = field(default_factory=dict)
    seconds: float = 0.0
    looks: int = 0


def usage(pid: int) -> Usage:
    """Return the proportional memory of a process; nothing of one that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return {}
    return {PARTS[name]: 1024 * int(size) for name, size in LINE.findall(text) if name in PARTS}


def processes(root: psutil.Process) -> Iterator[tuple[str, int]]:
    """Yield what each process of a run is for, and its id."""
    yield "driver", root.pid
    for child in root.children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        yield ("workers" if title.startswith("ray::Worker") else "ray"), child.pid


def look(root: psutil.Process) -> dict[str, Usage]:
    """Return the memory of a run at this moment, by role."""
    found: dict[str, Usage] = {}
    for role, pid in processes(root):
        held = found.setdefault(role, dict.fromkeys(PARTS.values(), 0))
        for part, size in usage(pid).items():
            held[part] += size
    return found


def measure(preset: str, precision: str, workers: int, settings: Sequence[str] = ()) -> Peak:
    """Run a simulation and return its peak.

    Raises
    ------
    RuntimeError
        The run failed.
    """
    peak = Peak(preset, precision, workers)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--preset", preset, "--workers", str(workers), "--out", f"{folder}/run", "--json"]
        words = [*options, *SETTINGS, f"train.precision={precision}", *settings]
        started = time.perf_counter()
        with Path(folder, "log").open("w+") as log:
            command = [sys.executable, "-m", "fedpeft", "simulate", *words]
            run = subprocess.Popen(command, stdout=log, stderr=log)
            root = psutil.Process(run.pid)
            while run.poll() is None:
                held = look(root)
                total = sum(part["all"] for part in held.values())
                peak.looks += 1
                if total > peak.total:
                    peak.total, peak.roles = total, held
                time.sleep(INTERVAL)
            if run.returncode:
                log.seek(0)
                raise RuntimeError(f"fedpeft simulate {' '.join(words)} failed:\n{log.read()[-2000:]}")
        peak.seconds = round(time.perf_counter() - started, 1)
    return peak


def ratios(peaks: Sequence[Peak]) -> Mapping[str, float]:
    """Return the peak with 2 workers over that with 1, by preset and precision, where both were measured."""
    of = {(peak.preset, peak.precision, peak.workers): peak.total for peak in peaks}
    return {
        f"{preset} {precision}": round(total / of[preset, precision, 1], 3)
        for (preset, precision, workers), total in of.items()
        if workers == 2 and (preset, precision, 1) in of
    }


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["docstrings"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--workers", default="1,2", help="numbers of workers, comma-separated; 0 is one process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="section.key=value, as for fedpeft simulate")
    options = parser.parse_args(arguments)
    numbers = [int(word) for word in options.workers.split(",")]
    peaks = [
        measure(preset, precision, workers, options.settings)
        for preset in options.preset
        for precision in options.precision
        for workers in numbers
    ]
    table = Table("preset", "precision", "workers", "peak GB", "driver: own + files", "workers", "Ray", "shared", "s")
    for peak in peaks:
        cells = [
            f"{_gb(part['own'])} + {_gb(part['files'])}" if (part := peak.roles.get(role)) else "-"
            for role in ("driver", "workers", "ray")
        ]
        shared = _gb(sum(part["shared"] for part in peak.roles.values()))
        facts = (peak.preset, peak.precision, str(peak.workers), _gb(peak.total))
        table.add_row(*facts, *cells, shared, f"{peak.seconds:.0f}")
    Console().print(table)
    found = ratios(peaks)
    for what, ratio in found.items():
        print(f"{what}: 2 workers hold {ratio:.2f} times what 1 holds (at most {TARGET})")
    if options.json:
        machine: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
        rows = {"rows": [asdict(peak) for peak in peaks], "ratios": found}
        options.json.write_text(json.dumps(machine | rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
