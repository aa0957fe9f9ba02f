"""What keeping the frozen prefix saves: rounds of a MiniLM client with adapters in the last 2 of 6 blocks.

    python -m benchmarks.prefix [--turns 10] [--steps 4] [--layers last:2] [--quick] [--json FILE]

The longest rows, so that all are of ``data.max_length`` tokens; no dropout in the base. Two models of one process take
turns, step by step, one of them fed with kept hidden states; a figure is the median over turns of the ratio of one
pair, by processor time, on one thread: of the round in which the states are computed and written, of the rounds after
it, and of scoring as many rows. ``limit`` is what the products of blocks alone allow, each 12 d^2 a token forward:
backward as many, but 3 fewer in the lowest adapted block, whose inputs ask for no gradient.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.job import Work
from benchmarks.peer import small
from benchmarks.record import Figure, machine, parser, publish, variables
from fedpeft.cache import CACHE_VARIABLE
from fedpeft.config import RunConfig
from fedpeft.presets import materialize
from fedpeft.resident import Resident
from fedpeft.training.evaluation import score
from fedpeft.training.local import Turn, train_locally
from fedpeft.training.prefix import feeding, prefix_of

TARGET = 2.5


def limit(adapted: int, blocks: int, *, trains: bool) -> float:
    """Return the ratio of products of all blocks forward and the adapted ones backward to those of the adapted alone.

    Of 12 d^2 products of a block and token, 3 are those of query, key and value.
    """
    backward = (adapted - 3 / 12) if trains else 0.0
    return (blocks + backward) / (adapted + backward)


def rounds(config: RunConfig, home: Resident, rows: NDArray[np.int64]) -> Callable[[int], float]:
    """Return a function that trains a client for one round, and tells how long that took the processor."""

    def one(number: int) -> float:
        turn = Turn(0, "client", number + 1, 10_000)
        started = time.process_time()
        with feeding(home.adapted.model, config):
            train_locally(home.adapted, home.data.train, rows, config.train, turn)
        return time.process_time() - started

    return one


def scorings(config: RunConfig, home: Resident, rows: NDArray[np.int64]) -> Callable[[int], float]:
    """Return a function that scores rows, and tells how long that took the processor."""

    def one(number: int) -> float:
        started = time.process_time()
        score(home.adapted.model, home.data.train.take(rows), config)
        return time.process_time() - started

    return one


def pairs(without: Callable[[int], float], fed: Callable[[int], float], turns: range) -> list[tuple[float, float]]:
    """Return pairs of seconds."""
    found = []
    for turn in turns:
        if turn % 2:
            found.append((without(turn), fed(turn)))
        else:
            after = fed(turn)
            found.append((without(turn), after))
    return found


def figure(what: str, taken: Sequence[tuple[float, float]], most: float, target: float | None = None) -> Figure:
    """Summarise pairs."""
    ratios = sorted(before / after for before, after in taken)
    seconds = statistics.median(before for before, _ in taken)
    detail = {"without_s": seconds, "ratios": ratios, "limit": most}
    return Figure(what, statistics.median(ratios), target=target, detail=detail)


def measure(work: Work, precision: str, turns: int) -> list[Figure]:
    """Time pairs of rounds, and of scorings."""
    work = work.but(train__precision=precision, model__dropout="0")
    made = {on: work.but(simulation__prefix_cache=on).config() for on in ("off", "on")}
    homes = {on: Resident(config) for on, config in made.items()}
    split, train = homes["off"].data.train, made["off"].train
    assert train.local_steps is not None
    rows = np.argsort(-split.lengths, kind="stable")[: train.local_steps * train.batch_size]
    below = prefix_of(homes["on"].adapted.model, precision)
    without, fed = (rounds(made[on], homes[on], rows) for on in ("off", "on"))
    without(0)  # whatever is made once
    begun = [(without(0), fed(0))]
    later = pairs(without, fed, range(1, 1 + turns))
    plain, kept = (scorings(made[on], homes[on], rows) for on in ("off", "on"))
    scored = pairs(plain, kept, range(max(1, turns // 2)))
    adapted = below.count - len(below.blocks)
    most = limit(adapted, below.count, trains=True)
    return [
        figure(f"{precision}: training from round 2 on", later, most, TARGET),
        figure(f"{precision}: the first round", begun, most),
        figure(f"{precision}: scoring", scored, limit(adapted, below.count, trains=False)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--turns", type=int, default=10)
    given_options.add_argument("--steps", type=int, default=4)
    given_options.add_argument("--batch-size", type=int, default=16)
    given_options.add_argument("--layers", default="last:2")
    given_options.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    given = given_options.parse_args(arguments)
    before = machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        if given.quick:
            work = small(Path(folder))
            given.layers, given.precisions, given.turns = "last:1", ["fp32"], 2
        else:
            shape = {"train.local_steps": given.steps, "train.batch_size": given.batch_size, "data.max_length": 128}
            files = materialize("docstrings")  # from the cache that there is, not into the one below
            work = Work({**shape, "model.name": str(files.model), "data.source": str(files.data)}, "docstrings")
        with variables(**{CACHE_VARIABLE: folder}):  # nothing of an earlier time is there
            work = work.but(adapter__layers=given.layers)
            figures = [each for precision in given.precisions for each in measure(work, precision, given.turns)]
    publish("prefix", figures, given, before)


if __name__ == "__main__":
    main()
