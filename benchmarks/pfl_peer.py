"""The same work on pfl, Apple's simulator (pfl-research), from command to end.

    python -m benchmarks.pfl_peer [--python VENV/bin/python] [--rounds 2] [--steps 5] [--quick] [--json FILE]

pfl 0.6.0 asks for an older dp-accounting than fedpeft's tests, so it wants an environment of its own beside this one's
packages; it needs nothing of fedpeft:

    python -m venv pfl-venv && pfl-venv/bin/pip install "pfl[pytorch]==0.6.0" peft transformers datasets

It runs as its documentation says, a process a core under ``torch.distributed.run``. ``--quick`` looks only whether both
are given the same work, if there is no pfl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.job import Simulated, here, job, listened, simulated
from benchmarks.peer import compared, series, settings, small
from benchmarks.record import ROOT, Figure, machine, parser, publish

VARIABLE = "FEDPEFT_PFL_PYTHON"  # the interpreter of pfl's environment


def has_pfl(python: str) -> bool:
    """Tell whether an interpreter has pfl."""
    asked = subprocess.run([python, "-c", "import pfl, peft, datasets"], capture_output=True, check=False)
    return asked.returncode == 0


def through_pfl(given: dict[str, Any], python: str) -> Simulated:
    """Run it, a process a core."""
    with tempfile.TemporaryDirectory(prefix="pfl-app-") as folder:
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(given))
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(given["cores"])]
        command = [python, *launch, "-m", "benchmarks.pfl_app", str(path)]
        return listened(command, Path(folder), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--python", default=os.environ.get(VARIABLE, sys.executable), help=f"or ${VARIABLE}")
    given_options.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    given_options.add_argument("--rounds", type=int, default=2)
    given_options.add_argument("--steps", type=int, default=5, help="of each client in a round")
    given = given_options.parse_args(arguments)
    before = machine()
    if not has_pfl(given.python):
        absent(given, before)
        return
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        rounds, simulate = given.rounds, simulated
        works = {each: job(rounds, each).but(train__local_steps=given.steps) for each in given.precisions}
        if given.quick:
            rounds, works, simulate = 1, {"fp32": small(Path(folder))}, here
        peer = through_pfl(settings(next(iter(works.values())), "pooler", rounds), given.python)
        ours = {precision: simulate(work) for precision, work in works.items()}
    figures = []
    for precision, each in ours.items():
        name = f"{precision} against pfl"
        figures += compared(name, each, peer, rounds, None)[:2]
        if rounds > 1:
            between = {f"{side}_s": run.at[rounds] - run.at[1] for side, run in (("peer", peer), ("ours", each))}
            what = f"{name}: rounds after the first, with their scores"
            figures.append(Figure(what, between["peer_s"] / between["ours_s"], detail=between))
    runs = {f"fedpeft {name}": series(each) for name, each in ours.items()} | {"pfl": series(peer)}
    publish("pfl_peer", figures, given, before, runs=runs)


def absent(given: argparse.Namespace, before: dict[str, Any]) -> None:
    """Say that there is nothing to compare with, which is no failure."""
    print(f"no pfl in {given.python}; see `python -m benchmarks.pfl_peer --help`", file=sys.stderr)
    if given.json:
        publish("pfl_peer", [], given, before)


if __name__ == "__main__":
    main()
