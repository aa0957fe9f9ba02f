"""How much memory a simulation holds at its peak, with so many workers, and what it is made of.

    python -m benchmarks.memory [--presets docstrings chat] [--precisions fp32 bf16] [--workers 1 2] [--quick]
                                [--json FILE] [KEY=VALUE ...]

Each is a whole `fedpeft simulate` of 1 round, 4 clients and 4 steps, 2 of `chat`, in a process of its own. A preset
that was never fetched into the cache is left out, and said. Several times a second the proportional set size (PSS: a
page that several processes map counts once) of the command and of all its descendants, Ray's included, is summed. The
parts are those of the moment at which the sum was largest: ``own`` is anonymous memory, ``files`` what is mapped from
files (weights, libraries), ``shared`` is memory in /dev/shm (Ray's object store). The process that workers are forked
from counts among Ray's. Linux only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.job import CommandError, Work
from benchmarks.peer import small
from benchmarks.record import Figure, machine, parser, publish
from fedpeft.presets import find, folder_of

TARGET = 1.25  # of two workers against one
INTERVAL = 0.2  # seconds between two looks
PARTS = {"Pss": "all", "Pss_Anon": "own", "Pss_File": "files", "Pss_Shmem": "shared"}
LINE = re.compile(r"(\w+): +(\d+) kB")
# enough for every worker to have trained, and for the test rows to be scored
SETTINGS = {"federation.rounds": 1, "federation.clients": 4, "train.local_steps": 4}
# whose clients are its topics; a step is 20 times as long
OWN_SETTINGS = {"chat": {"federation.rounds": 1, "federation.fraction": 0.19, "train.local_steps": 2}}

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


def measure(work: Work, precision: str, workers: int) -> Peak:
    """Run a simulation and return its peak.

    Raises
    ------
    CommandError
        The run failed.
    """
    peak = Peak(work.preset or "tiny", precision, workers)
    work = work.but(train__precision=precision, simulation__workers=workers)
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        command = [sys.executable, "-m", "fedpeft", "simulate", "--json", "--out", f"{folder}/run", *work.words()]
        started = time.perf_counter()
        with Path(folder, "log").open("w+") as log:
            run = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
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
                raise CommandError(f"{' '.join(command)} ended with {run.returncode}:\n{log.read()[-2000:]}")
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


def figures(peaks: Sequence[Peak]) -> list[Figure]:
    """Return the ratios, and each peak with its parts in GB."""
    found = [Figure(f"{what}: 2 workers against 1", each, "x", TARGET, "most") for what, each in ratios(peaks).items()]
    for peak in peaks:
        parts = {
            f"{role} {part}": size / 1e9
            for role, held in peak.roles.items()
            for part, size in held.items()
            if part != "all"
        }
        what = f"{peak.preset} {peak.precision}, {peak.workers} worker{'s' * (peak.workers != 1)}: peak"
        found.append(Figure(what, peak.total / 1e9, "GB", detail=parts))
    return found


def at_hand(name: str) -> bool:
    """Tell whether a preset can be used without fetching it; say so if not."""
    if find(name).fetched and not folder_of(find(name)).is_dir():
        print(f"{name} is left out: first `fedpeft presets fetch {name}`", file=sys.stderr)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--presets", nargs="+", default=["docstrings", "chat"])
    given_options.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    given_options.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="0 is one process")
    given_options.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as for fedpeft simulate")
    given = given_options.parse_args(arguments)
    before = machine()
    more = dict(each.split("=", 1) for each in given.settings)
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        if given.quick:
            works, given.precisions, given.workers = [small(Path(folder))], ["fp32"], [0]
        else:
            works = [
                Work({**OWN_SETTINGS.get(name, SETTINGS), **more}, name) for name in given.presets if at_hand(name)
            ]
        peaks = [
            measure(work, precision, workers)
            for work in works
            for precision in given.precisions
            for workers in given.workers
        ]
    publish("memory", figures(peaks), given, before, seconds=[peak.seconds for peak in peaks])


if __name__ == "__main__":
    main()
