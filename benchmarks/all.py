"""The whole record on one quiet machine, in less than 25 minutes on two cores: the tables of docs/performance.md.

    python -m benchmarks.all [--only peer loop] [--full] [--kills 20] [--quick] [--tables]

Each benchmark runs in a process of its own and writes ``benchmarks/results/NAME.json``; one that fails is said, and the
others go on. At the end come the rows that have a target, and the drawing. ``--tables`` runs nothing: it writes the
tables of the document anew from what is there.

To keep to that time some are smaller here than by themselves: fewer rounds and steps of the job, fewer turns and fewer
kills (the options are `RECORD`, and stand in the tables). ``--full`` runs each as it is by itself, in about an hour;
``--kills 20`` kills as often as there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, ROOT, Figure, read, shown

# what is run in which order, the longest first while the machine is quiet; those that are not here are left out
RECORD: dict[str, list[str]] = {
    "peer": ["--rounds", "2", "--longer", "4", "--steps", "5"],
    "loop": ["--steps", "2"],
    "pfl_peer": ["--steps", "2"],
    "step": ["--turns", "10"],
    "scaling": ["--rounds", "2"],
    "engine": ["--rounds", "2"],
    "cohorts": [],
    "memory": [],
    "prefix": ["--turns", "5"],
    "batched": [],
    "language_models": [],
    "startup": ["--turns", "1"],
    "kills": ["--kills", "5"],
}


def present(names: Sequence[str]) -> list[str]:
    """Return those benchmarks that are there."""
    return [name for name in names if (ROOT / "benchmarks" / f"{name}.py").is_file()]


def options_of(name: str, given: argparse.Namespace) -> list[str]:
    """Return what a benchmark is started with."""
    if given.quick:
        return ["--quick"]
    if name == "kills" and given.kills:
        return ["--kills", str(given.kills)]
    return [] if given.full else RECORD[name]


def run(name: str, folder: Path, options: Sequence[str]) -> bool:
    """Run one; return whether it came to its end."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(folder / f"{name}.json"), *options]
    started = time.perf_counter()
    print(f"--- {name}", flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    print(f"--- {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return done.returncode == 0


def rows(folder: Path) -> dict[str, list[Figure]]:
    """Return the figures of all results in a folder, by benchmark in the order of the record; others are skipped."""
    found = {}
    for name in RECORD:
        path = folder / f"{name}.json"
        if path.is_file():
            try:
                found[name] = read(path)["figures"]
            except (KeyError, TypeError):
                print(f"{path} is not of benchmarks.record", file=sys.stderr)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, and print the rows with a target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECORD, default=list(RECORD))
    parser.add_argument("--full", action="store_true", help="each in the size that it has by itself")
    parser.add_argument("--kills", type=int, help=f"of each kind; {RECORD['kills'][-1]}, or 20 with --full")
    parser.add_argument("--quick", action="store_true", help="see that all run; nothing is kept")
    parser.add_argument("--tables", action="store_true", help="write the document's tables from the results there")
    given = parser.parse_args(arguments)
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as scratch:
        folder = Path(scratch) if given.quick else RESULTS
        if not given.tables:
            if os.getloadavg()[0] > 0.5:
                print(f"the machine is not quiet (load {os.getloadavg()[0]:.1f}); times will say little")
            failed = [name for name in present(given.only) if not run(name, folder, options_of(name, given))]
        found = rows(folder)
    table = Table("benchmark", "what", "figure", "target", "")
    for name, figures in found.items():
        for figure in figures:
            if figure.target is not None:
                value = shown(figure.value, figure.unit)
                table.add_row(name, figure.what, value, figure.wanted, "yes" if figure.met else "no")
    Console().print(table)
    if not given.quick:
        from benchmarks.draw import draw, write_tables

        draw(RESULTS)
        write_tables(RESULTS)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
