"""The engine's own cost against Flower's runtime: clients that send back what they got.

    python -m benchmarks.engine [--clients 100] [--payloads 1000 1000000 20000000] [--quick] [--json FILE]

Both have as many workers of one CPU as there are cores. The first round, in which workers load the app, is left out.
Memory is the driver's alone at its peak; a second ratio is of what it grew by above what it held before the first
round, since Python and the libraries alone take some hundred megabytes on either side; a third of the same without
pages that it shares, such as those of Ray's store.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.echo.sides import through_ours
from benchmarks.job import listened
from benchmarks.record import ROOT, Figure, machine, parser, publish

TIME, MEMORY = 0.3, 0.2


def measured(side: str, size: int, clients: int, rounds: int) -> dict[str, Any]:
    """Have one engine hold rounds; return the seconds of one and the driver's bytes."""
    words = [side, str(size), str(clients), str(rounds), str(os.cpu_count())]
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        command = [sys.executable, "-m", "benchmarks.echo", *words]
        (told,) = listened(command, Path(folder), PYTHONPATH=str(ROOT)).events
    return summed(told)


def summed(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seconds of a round after the first, and the driver's bytes."""
    after_first = told["seconds"][1:] or told["seconds"]
    return {
        "seconds": statistics.median(after_first),
        "peak": told["peak"],
        "grown": told["peak"] - told["before"],
        "own": told["own_grown"],
    }


def name_of(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size // 1_000_000} MB" if size >= 1_000_000 else f"{size // 1000} KB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--clients", type=int, default=100)
    given_options.add_argument("--rounds", type=int, default=3)
    given_options.add_argument("--payloads", type=int, nargs="+", default=[1_000, 1_000_000, 20_000_000])
    given = given_options.parse_args(arguments)
    before = machine()
    if given.quick:
        given.clients, given.rounds, given.payloads = 3, 1, [1_000]
    sides = () if given.quick else ("flower", "ray")
    figures, points = [], []
    for size in given.payloads:
        found = {side: measured(side, size, given.clients, given.rounds) for side in sides}
        found["inline"] = summed(through_ours(size, given.clients, given.rounds, 0))
        points += [{"side": side, "bytes": size, "clients": given.clients, **each} for side, each in found.items()]
        what = f"{given.clients} clients of {name_of(size)}"
        figures.append(Figure(f"{what}: a round in this process", found["inline"]["seconds"], "s"))
        if "flower" not in found:
            continue
        flower, ours = found["flower"], found["ray"]
        detail = {f"{side}_{key}": value for side in ("ray", "flower") for key, value in found[side].items()}
        figures += [
            Figure(f"{what}: time of a round", ours["seconds"] / flower["seconds"], "x", TIME, "most", detail),
            Figure(f"{what}: driver's memory", ours["peak"] / flower["peak"], "x", MEMORY, "most", detail),
            Figure(f"{what}: memory above the start", ours["grown"] / max(1, flower["grown"]), detail=detail),
            Figure(f"{what}: memory of its own above the start", ours["own"] / max(1, flower["own"])),
        ]
    publish("engine", figures, given, before, points=points)


if __name__ == "__main__":
    main()
