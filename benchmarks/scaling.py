"""Rounds on one and more workers, against the ideal: the clients' own training time divided by the workers.

    python -m benchmarks.scaling [--workers 1 2] [--precision bf16] [--quick] [--json FILE]

A client's own time is the ``seconds`` of its event, taken around its steps; a round's is from its messages to its
merged adapter. The first round, in which workers load model and rows, is left out. Evaluation is not part of a round.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.job import Simulated, here, job, simulated
from benchmarks.peer import small
from benchmarks.record import Figure, machine, parser, publish

EFFICIENCY = 0.95


def steady(run: Simulated, workers: int) -> dict[str, float]:
    """Return seconds of the rounds after the first, and of the ideal."""
    rounds = [event for event in run.of("round") if event["round"] > 1] or run.of("round")
    numbers = {event["round"] for event in rounds}
    pure = sum(event["seconds"] for event in run.of("client") if event["round"] in numbers)
    taken = sum(event["seconds"] for event in rounds)
    return {"rounds_s": taken, "ideal_s": pure / workers, "clients_a_minute": 60 * run.clients_in(numbers) / taken}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--workers", type=int, nargs="+", default=[1, *range(2, (os.cpu_count() or 1) + 1, 2)])
    given_options.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    given_options.add_argument("--rounds", type=int, default=3)
    given = given_options.parse_args(arguments)
    before = machine()
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        work, run = job(given.rounds, given.precision), simulated
        if given.quick:
            given.workers, work, run = [1], small(Path(folder)), here
        work = work.but(run__evaluate_every=1000)
        runs = {count: run(work.but(simulation__workers=count)) for count in given.workers}
    found = {count: steady(each, count) for count, each in runs.items()}
    figures, one = [], found[given.workers[0]]["clients_a_minute"]
    for count, each in found.items():
        target = EFFICIENCY if count == (os.cpu_count() or 1) else None
        what = f"{count} worker{'s' * (count > 1)}"
        figures.append(
            Figure(f"{what}: steady rounds against the ideal", each["ideal_s"] / each["rounds_s"], "x", target)
        )
        more = each["clients_a_minute"] / one
        figures.append(Figure(f"{what}: clients a minute against {given.workers[0]}", more, detail=each))
    publish("scaling", figures, given, before, points=[{"workers": count, **each} for count, each in found.items()])


if __name__ == "__main__":
    main()
