"""What a client's step costs beside its matrix products alone: all-MiniLM-L6 with LoRA of rank 8 on query and value.

    python -m benchmarks.step [--precision bf16] [--batch-size 16] [--tokens 128] [--json FILE] [KEY=VALUE ...]

One step is recorded: every matrix product and every fused attention that torch runs, forward and backward, with its
shapes, strides and types. These are then run alone, in the same order and on tensors of their own, in turns with whole
steps, in one process and on one thread; the figure is the median over turns of the ratio of one pair, in CPU time.
Rows are those of the docstrings preset, cut or repeated to the number of tokens. KEY=VALUE are settings of a run, such
as model.dropout=checkpoint.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fedpeft.chatter import silence
from fedpeft.config import configure
from fedpeft.resident import Resident
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


def make_step(settings: dict[str, Any], batch_size: int, tokens: int) -> tuple[Callable[[], None], Resident]:
    """Return a function that makes one whole step, batch included, and the model that it trains."""
    home = Resident(configure({"adapter.rank": 8, "train.batch_size": batch_size, **settings}, preset="docstrings"))
    adapted, train, split = home.adapted, home.config.train, home.data.train
    batch = np.sort(np.argsort(-split.lengths, kind="stable")[:batch_size])
    parameters = adapted.begin_training(adapted.trained)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    gradients = PlainGradients(adapted, split, batch, train, 1, np.random.default_rng(0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients.compute(batch)
        optimizer.step()

    training_mode(adapted.model)
    return step, home


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return what one call takes of this thread's CPU."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def measure(settings: dict[str, Any], batch_size: int, tokens: int, turns: int) -> dict[str, Any]:
    """Time pairs of a step and its products."""
    step, _ = make_step({"data.max_length": tokens, **settings}, batch_size, tokens)
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
    pairs = []
    for turn in range(turns):
        taken = {}
        for work in (step, products)[:: 1 if turn % 2 else -1]:
            with torch.set_grad_enabled(work is step):
                taken[work] = cpu_seconds(work)
        pairs.append((taken[step], taken[products]))
    ratios = sorted(whole / alone for whole, alone in pairs)
    quarter = len(ratios) // 4
    return {
        "step": statistics.median(whole for whole, _ in pairs),
        "products": statistics.median(alone for _, alone in pairs),
        "count": len(recorder.products),
        "ratio": statistics.median(ratios),
        "middle_half": [ratios[quarter], ratios[-quarter - 1]],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    silence()
    torch.set_num_threads(1)
    settings = {"train.precision": options.precision} | dict(each.split("=", 1) for each in options.settings)
    found = measure(settings, options.batch_size, options.tokens, options.turns)
    low, high = found["middle_half"]
    print(f"{platform.machine()}, 1 thread, {options.batch_size} x {options.tokens} tokens, {options.precision}")
    print(f"step {1000 * found['step']:.0f} ms, its {found['count']} products alone {1000 * found['products']:.0f} ms")
    print(f"ratio {found['ratio']:.2f} ({low:.2f} to {high:.2f}; at most {TARGET:g})")
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
