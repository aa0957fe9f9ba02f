"""Many tiny clients in a round: trained together against one by one, the whole round included.

    python -m benchmarks.batched [--clients 1000] [--sizes 32] [--pairs 1] [--quick] [--json FILE]

A client makes 2 steps of 4 x 16 tokens with LoRA and a head on a BERT of width 64, made up here; what it costs is
mostly the handling of its message and of many small tensors. Timed is the CPU time of a second round, in this process
and on one thread: messages, training, replies, checks and the mean. The two take turns; a figure is the median of the
ratios.
"""

from __future__ import annotations

import csv
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Figure, machine, parser, publish, ratio
from benchmarks.tiny import WORDS, write_model
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.runs import Event
from fedpeft.simulations.simulate import simulate

TARGET = 5.0
STEPS, BATCH, TOKENS = 2, 4, 16


def make_rows(path: Path, clients: int) -> None:
    """Write each client's rows, and a few that are held out."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "client"])
        for index in range(clients * (STEPS * BATCH + 1)):
            label = draw.randrange(2)
            words = draw.choices(WORDS[:30] if label else WORDS[30:], k=TOKENS)
            writer.writerow([" ".join(words), "yes" if label else "no", f"client-{index % clients}"])


def configuration(folder: Path, size: int | str) -> RunConfig:
    """Return the run, whose workers train so many clients at a time."""
    settings: dict[str, Any] = {
        "model.name": str(folder / "model"),
        "data.source": str(folder / "rows.csv"),
        "partition.by": "client",
        "model.dropout": "0",
        "adapter.rank": 4,
        "train.local_steps": STEPS,
        "train.batch_size": BATCH,
        "strategy.name": "fedit",
        "federation.rounds": 2,
        "run.evaluate_every": 2,
        "simulation.workers": 0,
        "simulation.batch_clients": size,
    }
    return resolve([nest(settings)])


def round_seconds(config: RunConfig) -> float:
    """Return the CPU seconds of a run's second round."""
    stamps: list[float] = []

    def listen(event: Event) -> None:
        if event["event"] == "round":
            stamps.append(time.process_time())

    with tempfile.TemporaryDirectory() as out:
        simulate(config, Path(out) / "run", listener=listen)
    return stamps[1] - stamps[0]


def measure(clients: int, sizes: Sequence[int], pairs: int) -> list[Figure]:
    """Return how much faster so many at a time are, and what a client takes one by one."""
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as place:
        folder = Path(place)
        write_model(folder / "model")
        make_rows(folder / "rows.csv", clients)
        seconds: dict[int | str, list[float]] = {name: [] for name in ("off", *sizes)}
        for _ in range(pairs):
            for name, taken in seconds.items():
                taken.append(round_seconds(configuration(folder, name)))
    alone = seconds.pop("off")
    figures = []
    for size, together in seconds.items():
        detail = {
            "alone_ms": 1000 * statistics.median(alone) / clients,
            "together_ms": 1000 * statistics.median(together) / clients,
        }
        what = f"{clients:,} clients, {size} at a time against one by one"
        figures.append(Figure(what, ratio(alone, together), target=TARGET, detail=detail))
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--clients", type=int, default=1000)
    given_options.add_argument("--sizes", type=int, nargs="+", default=[32])
    given_options.add_argument("--pairs", type=int, default=1)
    given = given_options.parse_args(arguments)
    before = machine()
    if given.quick:
        given.clients, given.sizes, given.pairs = 4, [2], 1
    publish("batched", measure(given.clients, given.sizes, given.pairs), given, before)


if __name__ == "__main__":
    main()
