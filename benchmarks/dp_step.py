"""What a private step costs beside a plain one, on the same batch: all-MiniLM-L6, and the digits' toy ViT.

    python -m benchmarks.dp_step [--turns 40] [--batch-size 16] [--quick] [--json FILE]

The two take turns within one process, step by step, so that what else the machine does slows both alike; a figure is
the median over turns of the ratio of one pair. A step is gradient and optimizer step; hooks are attached once, as they
are in a worker. Plain steps are taken by a model without hooks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.record import Figure, in_turns, machine, parser, publish, ratio
from fedpeft.config import configure
from fedpeft.privacy.dp_sgd import PrivateGradients
from fedpeft.privacy.independence import row_engine
from fedpeft.privacy.mechanism import RecordMechanism
from fedpeft.privacy.randomness import Randomness, secure, seeded
from fedpeft.resident import Resident
from fedpeft.training.local import PlainGradients

TARGET = 1.15


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


def measure(preset: str, kind: str, noise: str, batch_size: int, turns: int) -> Figure:
    """Time pairs of steps."""
    settings = {"adapter.kind": kind, "train.batch_size": batch_size}
    plain_home, private_home = (Resident(configure(settings, preset=preset)) for _ in range(2))
    lengths = plain_home.data.train.lengths
    batch = np.sort(np.argsort(-lengths, kind="stable")[:batch_size])  # the longest rows, as many tokens as are kept
    plain = steps(plain_home, batch, None)
    private = steps(private_home, batch, secure() if noise == "secure" else seeded(0, "benchmark"))
    for warm in (plain, private) * 3:
        warm()
    taken = in_turns({"plain": plain, "private": private}, turns)
    ratios = sorted(after / before for before, after in zip(taken["plain"], taken["private"], strict=True))
    detail = {
        "plain_ms": 1000 * statistics.median(taken["plain"]),
        "low": ratios[turns // 4],
        "high": ratios[-(turns // 4) - 1],
    }
    what = f"{preset}, {kind}, {noise} noise: private / plain"
    return Figure(what, ratio(taken["private"], taken["plain"]), "x", TARGET, "most", detail)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--turns", type=int, default=40)
    given_options.add_argument("--batch-size", type=int, default=16)
    given_options.add_argument("--threads", type=int, default=1)
    given_options.add_argument("--presets", nargs="+", default=["docstrings", "digits"])
    given = given_options.parse_args(arguments)
    before = machine()
    if given.quick:
        given.turns, given.batch_size, given.presets = 2, 4, ["digits"]
    torch.set_num_threads(given.threads)
    figures = [
        measure(preset, kind, noise, given.batch_size, given.turns)
        for preset in given.presets
        for kind in ("lora", "ffa-lora")
        for noise in ("seeded", "secure")
    ]
    publish("dp_step", figures, given, before)


if __name__ == "__main__":
    main()
