"""What a client's step costs beside its matrix products alone: all-MiniLM-L6 with LoRA of rank 8 on query and value.

    python -m benchmarks.step [--precisions fp32 bf16] [--turns 30] [--quick] [--json FILE] [KEY=VALUE ...]

One step is recorded: every matrix product and every fused attention that torch runs, forward and backward, with its
shapes, strides and types. These are then run alone, in the same order and on tensors of their own, in turns with whole
steps, in one process and on one thread; the figure is the median over turns of the ratio of one pair, in CPU time.
Rows are the longest of the docstrings preset, cut to the number of tokens. Each precision is measured with the dropout
of the base's checkpoint and with none. KEY=VALUE are further settings of a run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.job import Work
from benchmarks.peer import small
from benchmarks.record import Figure, machine, parser, publish, ratio
from fedpeft.training.local import PlainGradients, training_mode

TARGET = 1.35
# what multiplies matrices, by the name of the operation; the rest of a step is overhead
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "scaled_dot_product", "convolution")


class Recorder(TorchDispatchMode):
    """Notes every product that is run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), settings: dict[str, Any] | None = None
    ) -> Any:
        """Run it, and keep it if it is a product."""
        name = operation.name().rpartition("::")[2].partition(".")[0]
        if any(part in name for part in PRODUCTS):
            kept = tree_map_only(Tensor, _alike, (arguments, settings or {}))
            self.products.append((operation, *kept))
        return operation(*arguments, **(settings or {}))


def _alike(tensor: Tensor) -> Tensor:
    """Return a tensor of its own with the same shape, strides, type and values."""
    held = tensor.detach()
    return torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device).copy_(held)


def make_step(work: Work) -> Callable[[], None]:
    """Return a function that makes one whole step on the longest rows, batch included."""
    home = work.home()
    adapted, train, split = home.adapted, home.config.train, home.data.train
    batch = np.sort(np.argsort(-split.lengths, kind="stable")[: train.batch_size])
    parameters = adapted.begin_training(adapted.trained)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    gradients = PlainGradients(adapted, split, batch, train, 1, np.random.default_rng(0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients.compute(batch)
        optimizer.step()

    training_mode(adapted.model)
    return step


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return what one call takes of this thread's CPU."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def measure(name: str, work: Work, turns: int) -> Figure:
    """Time pairs of a step and its products."""
    step = make_step(work)
    for _ in range(3):
        step()
    with Recorder() as recorder:
        step()

    def products() -> None:
        for operation, arguments, keywords in recorder.products:
            operation(*arguments, **keywords)

    with torch.no_grad():
        for _ in range(3):
            products()
    taken: dict[Callable[[], None], list[float]] = {step: [], products: []}
    for turn in range(turns):
        for each in (step, products)[:: 1 if turn % 2 else -1]:
            with torch.set_grad_enabled(each is step):
                taken[each].append(cpu_seconds(each))
    whole, alone = taken.values()
    detail = {
        "step_ms": 1000 * statistics.median(whole),
        "products_ms": 1000 * statistics.median(alone),
        "products": len(recorder.products),
        "ratios": sorted(a / b for a, b in zip(whole, alone, strict=True)),
    }
    return Figure(f"{name}: a step against its products", ratio(whole, alone), "x", TARGET, "most", detail)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    given_options.add_argument("--dropouts", nargs="+", default=["0", "checkpoint"], help="model.dropout of each")
    given_options.add_argument("--batch-size", type=int, default=16)
    given_options.add_argument("--tokens", type=int, default=128)
    given_options.add_argument("--turns", type=int, default=30)
    given_options.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = given_options.parse_args(arguments)
    before = machine()
    torch.set_num_threads(1)
    shape = {"adapter.rank": 8, "train.batch_size": given.batch_size, "data.max_length": given.tokens}
    more = dict(each.split("=", 1) for each in given.settings)
    figures = []
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        work = Work({**shape, **more}, "docstrings")
        if given.quick:
            work, given.precisions, given.turns = small(Path(folder)), ["fp32"], 2
        for precision in given.precisions:
            for dropout in given.dropouts:
                each = work.but(train__precision=precision, model__dropout=dropout)
                figures.append(measure(f"{precision}, model.dropout={dropout}", each, given.turns))
    publish("step", figures, given, before)


if __name__ == "__main__":
    main()
