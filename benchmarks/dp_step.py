"""What a private step costs beside a plain one, on the same batch: all-MiniLM-L6, and the digits' toy ViT.

    python -m benchmarks.dp_step [--turns 40] [--batch-size 16] [--json FILE]

The two take turns within one process, step by step, so that what else the machine does slows both alike; a figure is
the median over turns of the ratio of one pair. A step is gradient and optimizer step; hooks are attached once, as they
are in a worker. Plain steps are taken by a model without hooks.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedpeft.chatter import silence
from fedpeft.config import configure
from fedpeft.privacy.dp_sgd import PrivateGradients
from fedpeft.privacy.independence import row_engine
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import Randomness, secure, seeded
from fedpeft.resident import Resident
from fedpeft.training.local import PlainGradients

TARGET = 1.15


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    kind: str
    noise: str
    plain: float  # seconds, median
    ratio: float  # median of pairs
    low: float
    high: float


def steps(home: Resident, batch: np.ndarray[Any, Any], source: Randomness | None) -> Callable[[], None]:
    """Return a function that makes one step on a batch, privately where there is a source of noise."""
    adapted, train, split = home.adapted, home.config.train, home.data.train
    parameters = adapted.begin_training(adapted.trained)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    if source is None:
        rng = np.random.default_rng(0)
        plain = PlainGradients(adapted, split, batch, train, 1, rng)
    else:
        mechanism = RecordMechanism(1.0, 0.1, 1, float(len(batch)), 1.0)
        private = PrivateGradients(
            row_engine(home), split, batch, mechanism, source, optimizer, physical=2 * len(batch)
        )

    def step() -> None:
        adapted.model.train()
        optimizer.zero_grad(set_to_none=True)
        (plain if source is None else private).compute(batch)
        optimizer.step()

    return step


def measure(preset: str, kind: str, noise: str, batch_size: int, turns: int) -> Row:
    """Time pairs of steps."""
    settings = {"adapter.kind": kind, "train.batch_size": batch_size}
    plain_home, private_home = (Resident(configure(settings, preset=preset)) for _ in range(2))
    lengths = plain_home.data.train.lengths
    batch = np.sort(np.argsort(-lengths, kind="stable")[:batch_size])  # the longest rows, as many tokens as are kept
    plain = steps(plain_home, batch, None)
    private = steps(private_home, batch, secure() if noise == "secure" else seeded(0, "benchmark"))
    for warm in (plain, private) * 3:
        warm()
    pairs = []
    for turn in range(turns):
        taken = {}
        for name, step in (("plain", plain), ("private", private))[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            step()
            taken[name] = time.perf_counter() - started
        pairs.append((taken["plain"], taken["private"]))
    ratios = sorted(after / before for before, after in pairs)
    quarter = len(ratios) // 4
    seconds = statistics.median(before for before, _ in pairs)
    return Row(preset, kind, noise, seconds, statistics.median(ratios), ratios[quarter], ratios[-quarter - 1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--presets", nargs="+", default=["docstrings", "digits"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    silence()
    torch.set_num_threads(options.threads)
    rows = [
        measure(preset, kind, noise, options.batch_size, options.turns)
        for preset in options.presets
        for kind in ("lora", "ffa-lora")
        for noise in ("seeded", "secure")
    ]
    table = Table("model", "adapter", "noise", "plain step", "private / plain", "middle half", f"at most {TARGET:g}")
    for row in rows:
        within = "yes" if row.ratio <= TARGET else "no"
        spread = f"{row.low:.3f} to {row.high:.3f}"
        table.add_row(row.model, row.kind, row.noise, f"{1000 * row.plain:.1f} ms", f"{row.ratio:.3f}", spread, within)
    print(f"{platform.machine()}, {options.threads} thread(s), batches of {options.batch_size}, {options.turns} pairs")
    Console().print(table)
    if options.json:
        facts = {"threads": options.threads, "batch_size": options.batch_size, "turns": options.turns}
        options.json.write_text(json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
