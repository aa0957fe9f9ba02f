"""What keeping the frozen prefix saves: rounds of a MiniLM client with adapters in the last 2 of 6 blocks.

    python -m benchmarks.prefix [--turns 10] [--steps 4] [--batch-size 16] [--layers last:2] [--json FILE]

The longest rows, so that all are of ``data.max_length`` tokens; no dropout in the base. Two models of one process take
turns, step by step, one of them fed with kept hidden states; a figure is the median over turns of the ratio of one
pair, by processor time, on one thread. `first` is the round in which the states are computed and written, `later` are
the rounds after it, `scoring` is that of as many test rows; `limit` is what the products of blocks alone allow, each 12
d^2 a token forward: backward as many, but 3 fewer in the lowest adapted block, whose inputs ask for no gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fedpeft.cache import CACHE_VARIABLE
from fedpeft.chatter import silence
from fedpeft.config import RunConfig, configure
from fedpeft.presets import materialize
from fedpeft.resident import Resident
from fedpeft.training.evaluation import score
from fedpeft.training.local import Turn, train_locally
from fedpeft.training.prefix import feeding, prefix_of

TARGET = 2.5


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    precision: str
    what: str
    without: float  # seconds of processor time, median
    ratio: float  # median of pairs
    low: float
    high: float
    limit: float


def limit(adapted: int, blocks: int, *, trains: bool) -> float:
    """Return the ratio of products of all blocks forward and the adapted ones backward to those of the adapted alone.

    Of 12 d^2 products of a block and token, 3 are those of query, key and value.
    """
    backward = (adapted - 3 / 12) if trains else 0.0
    return (blocks + backward) / (adapted + backward)


def base_without_dropout(folder: Path) -> Path:
    """Copy the preset's base, with no dropout in its configuration."""
    copy = shutil.copytree(materialize("docstrings").model, folder / "base")
    facts = json.loads((copy / "config.json").read_text())
    facts |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (copy / "config.json").write_text(json.dumps(facts))
    return Path(copy)


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


def pairs(without: Callable[[int], float], fed: Callable[[int], float], turns: int, first: int) -> list[Any]:
    """Return pairs of seconds."""
    found = []
    for turn in range(first, first + turns):
        if turn % 2:
            found.append((without(turn), fed(turn)))
        else:
            after = fed(turn)
            found.append((without(turn), after))
    return found


def row(precision: str, what: str, taken: Sequence[tuple[float, float]], most: float) -> Row:
    """Summarise pairs."""
    ratios = sorted(before / after for before, after in taken)
    quarter = len(ratios) // 4
    seconds = statistics.median(before for before, _ in taken)
    return Row(precision, what, seconds, statistics.median(ratios), ratios[quarter], ratios[-quarter - 1], most)


def measure(base: Path, precision: str, options: argparse.Namespace) -> list[Row]:
    """Time pairs of rounds, and of scorings."""
    settings = {
        "model.name": str(base),
        "adapter.layers": options.layers,
        "train.precision": precision,
        "train.local_steps": options.steps,
        "train.batch_size": options.batch_size,
        "data.max_length": 128,
    }
    made = {on: configure({**settings, "simulation.prefix_cache": on}, preset="docstrings") for on in ("off", "on")}
    homes = {on: Resident(config) for on, config in made.items()}
    split = homes["off"].data.train
    rows = np.argsort(-split.lengths, kind="stable")[: options.steps * options.batch_size]
    below = prefix_of(homes["on"].adapted.model, precision)
    without, fed = (rounds(made[on], homes[on], rows) for on in ("off", "on"))
    without(0)  # whatever is made once
    begun = [(without(0), fed(0))]
    later = pairs(without, fed, options.turns, 1)
    plain, kept = (scorings(made[on], homes[on], rows) for on in ("off", "on"))
    scored = pairs(plain, kept, max(1, options.turns // 2), 0)
    adapted = below.count - len(below.blocks)
    print(f"{precision}: {adapted} of {below.count} blocks adapted, rows of {split.lengths[rows].mean():.0f} tokens")
    found = [("first round", begun), ("later rounds", later), ("scoring", scored)]
    most = {trains: limit(adapted, below.count, trains=trains) for trains in (True, False)}
    return [row(precision, what, taken, most[taken is not scored]) for what, taken in found]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--layers", default="last:2")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    silence()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = base_without_dropout(Path(folder))
        os.environ[CACHE_VARIABLE] = folder  # nothing of an earlier time is there
        rows = [each for precision in options.precisions for each in measure(base, precision, options)]
    table = Table("precision", "what", "without", "without / with", "middle half", "limit", f"at least {TARGET:g}")
    for each in rows:
        spread = f"{each.low:.2f} to {each.high:.2f}"
        reached = "yes" if each.ratio >= TARGET else "no"
        figures = (f"{each.without:.2f} s", f"{each.ratio:.2f}", spread, f"{each.limit:.2f}")
        table.add_row(each.precision, each.what, *figures, reached)
    print(f"{platform.machine()}, one thread, {options.steps} steps of {options.batch_size}, {options.turns} pairs")
    Console().print(table)
    if options.json:
        facts = {"steps": options.steps, "batch_size": options.batch_size, "turns": options.turns}
        options.json.write_text(json.dumps(facts | {"rows": [asdict(each) for each in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
