"""What all benchmarks share: the machine's description, medians of interleaved pairs, peaks of memory, and the files.

A benchmark returns `Figure`s, of which those with a target are rows of the table in docs/performance.md, and `publish`
prints them and writes ``benchmarks/results/NAME.json`` (or what ``--json`` names).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import psutil
from rich.console import Console
from rich.table import Table

from fedpeft.chatter import silence
from fedpeft.runs.machine import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FAST_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


@dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    Parameters
    ----------
    what : str
        In words.
    value : float
        The figure.
    unit : str
        ``x`` for a ratio, else such as ``s`` or ``GB``.
    target : float, optional
        What it should be at least, or at most; a figure without one is there to be read.
    at : str
        ``"least"`` or ``"most"``.
    detail : mapping
        What it was made of.
    """

    what: str
    value: float
    unit: str = "x"
    target: float | None = None
    at: Literal["least", "most"] = "least"
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at == "least" else self.value <= self.target

    @property
    def wanted(self) -> str:
        """The target in words."""
        return "" if self.target is None else f"at {self.at} {self.target:g} {self.unit}"


def machine() -> dict[str, Any]:
    """Describe processor, memory, load and software."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    return {
        "processor": model.group(1) if model else "unknown",
        "units": [unit for unit in FAST_UNITS if re.search(rf"\b{unit}\b", text)],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),  # beside the benchmark itself: anything near a core spoils times
        **environment(),
    }


class Parser(argparse.ArgumentParser):
    """One that remembers which options were given, as ``words``; a result names them with its command."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and keep the words that are neither ``--json`` nor ``--quick``."""
        given = super().parse_args(args, namespace)
        given.words = []
        for name, value in vars(given).items():
            if name not in ("json", "quick", "words") and value != self.get_default(name):
                values = value if isinstance(value, list) else [value]
                option = [] if name == "settings" else [f"--{name.replace('_', '-')}"]
                given.words += [*option, *map(str, values)]
        return given


def parser(description: str | None) -> Parser:
    """Return a parser of what all benchmarks take, and let the libraries below be silent."""
    silence()
    made = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="where the figures go; benchmarks/results/NAME.json")
    made.add_argument("--quick", action="store_true", help="sizes whose figures mean nothing, to see that it works")
    return made


def publish(
    name: str, figures: Sequence[Figure], given: argparse.Namespace, before: Mapping[str, Any], **more: Any
) -> None:
    """Print figures and write them; those of ``--quick`` only where ``--json`` says so.

    Parameters
    ----------
    name : str
        The benchmark's.
    figures : sequence of Figure
        What it found.
    given : argparse.Namespace
        What it was asked for; recorded as well.
    before : mapping
        What `machine` said before it began.
    **more
        Other things to keep, such as series to draw.
    """
    table = Table("what", "figure", "target", "", title=f"benchmarks.{name}", caption=before["processor"])
    for figure in figures:
        met = {None: "", True: "yes", False: "no"}[figure.met]
        table.add_row(figure.what, shown(figure.value, figure.unit), figure.wanted, met)
    Console().print(table)
    path = given.json or (None if given.quick else RESULTS / f"{name}.json")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        "benchmark": name,
        "command": " ".join([f"python -m benchmarks.{name}", *given.words]),
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(given).items()
            if key != "words"
        },
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": before,
        "figures": [asdict(figure) for figure in figures],
        **more,
    }
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Return what `publish` wrote, its figures as such."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept | {"figures": [Figure(**figure) for figure in kept["figures"]]}


def shown(value: float, unit: str) -> str:
    """Return a figure with three digits and its unit."""
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


# --- time ------------------------------------------------------------


def in_turns(contenders: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Time contenders turn by turn, the order reversed each time, so that what else the machine does slows all alike.

    Returns
    -------
    dict of str to list of float
        Seconds of each turn.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            contenders[name]()
            taken[name].append(time.perf_counter() - started)
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


# --- memory ------------------------------------------------------------


def pss(process: int) -> int:
    """Return a process's proportional share of memory in bytes, 0 where it is gone; sums count shared pages once."""
    return _kilobytes(Path(f"/proc/{process}/smaps_rollup"), "Pss")


def high_water(process: int) -> int:
    """Return the most memory that a process has had resident, in bytes, as the kernel keeps it; 0 where it is gone."""
    return _kilobytes(Path(f"/proc/{process}/status"), "VmHWM")


def own_memory(process: int) -> int:
    """Return the memory of a process now that is its own, shared pages and mapped files left out, in bytes."""
    return _kilobytes(Path(f"/proc/{process}/status"), "RssAnon")


def reset_high_water() -> None:
    """Let this process's `high_water` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _kilobytes(path: Path, name: str) -> int:
    try:
        text = path.read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found.group(1)) if found else 0


class Peak:
    """The largest memory of a process and all below it while a block runs, looked at every so often.

    Looking walks all their pages, which takes time of theirs: hence seldom. The process's own high water is the
    kernel's, which misses nothing.

    Parameters
    ----------
    process : int
        Its id.
    every : float
        Seconds between two looks.

    Attributes
    ----------
    highest, own : int
        Bytes of all of them, and of the process alone.
    """

    def __init__(self, process: int, every: float = 1.0) -> None:
        self._process, self._every = process, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.highest = self.own = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        self._thread.join()

    def look(self) -> None:
        """Look now."""
        try:
            children = psutil.Process(self._process).children(recursive=True)
        except psutil.Error:
            return
        self.highest = max(self.highest, sum(map(pss, [self._process, *(child.pid for child in children)])))
        self.own = max(self.own, high_water(self._process))

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self.look()


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables inside a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
