"""Against a bare PyTorch loop of the same steps on the same cores: no federation, no processes, no messages.

    python -m benchmarks.loop [--precision fp32] [--steps 5] [--quick] [--json FILE]

The loop holds one PEFT model, takes each client's steps one client after the other, on the batches that fedpeft takes,
padded alike, and averages in numpy. It runs with one thread and with one a core. `fedpeft simulate` has a worker a
core; its time is that of its last round.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.job import Work, here, job, simulated
from benchmarks.peer import settings, small
from benchmarks.peer_app import task
from benchmarks.record import Figure, machine, parser, publish, variables
from fedpeft.seeds import generator
from fedpeft.training.local import batches


class Loop:
    """FedAvg by hand.

    Parameters
    ----------
    work : Work
        Whose rows, batches and steps they are.
    folder : Path
        For a file.
    bf16 : bool
        Frozen weights in bf16, under autocast; the trained ones stay in fp32.
    """

    def __init__(self, work: Work, folder: Path, *, bf16: bool) -> None:
        self.home = work.home()
        (folder / "settings.json").write_text(json.dumps(settings(work, "pooler", 1)))
        with variables(**{task.VARIABLE: str(folder / "settings.json")}):
            task.settings.cache_clear()
            self.model = task.load_model()
        self.autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        for parameter in self.model.parameters():
            if bf16 and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.model.train()

    def round(self, number: int) -> None:
        """Let all clients take their steps from the same start, and average by their rows."""
        train = self.home.config.train
        start = {name: p.detach().numpy().copy() for name, p in self.trained.items()}
        total = {name: np.zeros_like(value) for name, value in start.items()}
        parts = self.home.partition
        for client, rows in zip(parts.client_ids, parts.indices, strict=True):
            for name, p in self.trained.items():
                p.data = torch.from_numpy(start[name].copy())
            optimizer = torch.optim.AdamW(self.trained.values(), lr=train.learning_rate, weight_decay=0.0)
            rng = generator(self.home.config.run.seed, "batches", number, client)
            assert train.local_steps is not None
            for batch in batches(rows, train.batch_size, train.local_steps, rng):
                optimizer.zero_grad()
                with self.autocast:
                    loss = self.model(**self.home.data.train.batch(batch)).loss
                loss.backward()
                optimizer.step()
            share = len(rows) / sum(map(len, parts.indices))
            for name, p in self.trained.items():
                total[name] += share * p.detach().numpy()
        for name, p in self.trained.items():
            p.data = torch.from_numpy(total[name])

    def seconds(self, threads: int) -> float:
        """Time a round with so many threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            started = time.perf_counter()
            self.round(1)
            return time.perf_counter() - started
        finally:
            torch.set_num_threads(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    given_options.add_argument("--steps", type=int, default=5, help="of each client in a round")
    given = given_options.parse_args(arguments)
    before = machine()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        work, run = job(2, given.precision).but(train__local_steps=given.steps), simulated
        if given.quick:
            work, run = small(Path(folder)), here
        ours = run(work.but(run__evaluate_every=1000)).of("round")[-1]["seconds"]
        loop = Loop(work, Path(folder), bf16=given.precision == "bf16" and not given.quick)
        taken = {threads: loop.seconds(threads) for threads in sorted({1, cores})}
    figures = [
        Figure(
            f"{given.precision}: a round against a loop of {threads} thread{'s' * (threads > 1)}",
            seconds / ours,
            target=1.0,
            detail={"loop_s": seconds, "ours_s": ours},
        )
        for threads, seconds in taken.items()
    ]
    publish("loop", figures, given, before)


if __name__ == "__main__":
    main()
