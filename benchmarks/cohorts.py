"""How a simulation grows with its clients: the driver's memory and the time of a client, to 100,000 clients.

    python -m benchmarks.cohorts [--workers 2] [--quick] [--json FILE]

Each is ``fedpeft simulate`` with a BERT of two layers of width 64 and one row of 16 words a client at least. All have
the SAME 100,000 rows, so that what is compared is what clients cost; rows are encoded beforehand.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.job import Simulated, Work, here, simulated
from benchmarks.record import Figure, machine, parser, publish
from benchmarks.tiny import write_model, write_rows

AT_ONCE = 100
STEADY = ((100, AT_ONCE), (1_000, AT_ONCE), (10_000, AT_ONCE), (100_000, AT_ONCE))  # clients, and how many a round
ALL_AT_ONCE = (10_000, 10_000)
MEMORY = 1.2


def work(folder: Path, rows: int) -> Work:
    """Return the work, of which only the number of clients differs."""
    return Work(
        {
            "model.name": str(write_model(folder / "model")),
            "model.task": "sequence-classification",
            "data.source": str(write_rows(folder / "rows", rows)),
            "data.text": "text",
            "data.label": "label",
            "data.max_length": 16,
            "partition.scheme": "iid",
            "adapter.targets": ["query", "value"],
            "train.local_steps": 2,
            "train.batch_size": 4,
            "run.evaluate_every": 1000,
            "strategy.name": "fedit",
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--workers", type=int, default=os.cpu_count())
    given_options.add_argument("--largest", type=int, default=100_000, help="leave out what has more clients")
    given = given_options.parse_args(arguments)
    before = machine()
    cases, run = [*STEADY, ALL_AT_ONCE], simulated
    if given.quick:
        cases, run = [(4, 2), (8, 2)], here
    cases = [case for case in cases if case[0] <= given.largest]
    found: dict[tuple[int, int], Simulated] = {}
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        base = work(Path(folder), max(clients for clients, _ in cases))
        base = base.but(simulation__workers=given.workers)
        _ = base.but(federation__clients=2).home().data  # encodes the rows
        for clients, cohort in cases:
            rounds = 1 if cohort > AT_ONCE else 2
            each = base.but(federation__clients=clients, federation__rounds=rounds)
            found[clients, cohort] = run(each.but(federation__fraction=cohort / clients))
    first = found[cases[0]]
    figures, points = [], []
    for (clients, cohort), each in found.items():
        seconds = each.of("round")[-1]["seconds"] / cohort
        name = f"{clients:,} clients, {cohort:,} a round"
        detail = {"driver_gb": each.driver / 1e9, "client_ms": 1000 * seconds, "whole_s": each.wall}
        points.append({"clients": clients, "cohort": cohort, **detail})
        if each is not first:
            what = f"{name}: driver's memory against {cases[0][0]}"
            figures.append(Figure(what, each.driver / first.driver, "x", MEMORY, "most", detail))
        figures.append(Figure(f"{name}: a client", 1000 * seconds, "ms", detail=detail))
    publish("cohorts", figures, given, before, points=points)


if __name__ == "__main__":
    main()
