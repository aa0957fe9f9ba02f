"""From the command to the first trained client, with model and rows in the cache.

    python -m benchmarks.startup [--presets digits docstrings] [--turns 3] [--quick] [--json FILE]

The client takes one step, so that what is measured is what comes before it. A run beforehand fills the cache.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.job import Work, here, simulated
from benchmarks.peer import small
from benchmarks.record import Figure, machine, parser, publish

SECONDS = 15.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--presets", nargs="+", default=["digits", "docstrings"])
    given_options.add_argument("--turns", type=int, default=3)
    given = given_options.parse_args(arguments)
    before = machine()
    one_step = {"federation.rounds": 1, "train.local_steps": 1, "run.evaluate_every": 1000}
    works, run = {name: Work(one_step, name) for name in given.presets}, simulated
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        if given.quick:
            works, run, given.turns = {"tiny": small(Path(folder))}, here, 1
        else:
            for work in works.values():
                run(work)
        found = {name: [run(work) for _ in range(given.turns)] for name, work in works.items()}
    figures = []
    for name, runs in found.items():
        firsts = [each.of("client")[0]["at"] for each in runs]
        detail = {
            "seconds": firsts,
            "evaluated_first_s": [each.at[0] for each in runs],
            "whole_s": [each.wall for each in runs],
        }
        what = f"{name}: start to first trained client"
        figures.append(Figure(what, statistics.median(firsts), "s", SECONDS, "most", detail))
    publish("startup", figures, given, before)


if __name__ == "__main__":
    main()
