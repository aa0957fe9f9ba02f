"""What clients of ranks 2, 4 and 8 learn together of a target that needs all eight: the table in docs/methods.md.

Run it with ``python -m benchmarks.mixed_ranks``; it takes seconds. Each client regresses the same target, a matrix with
eight equal singular values, by gradient descent on its own factors, and the server merges them. A quarter of the
target's energy lies in its first two directions; where what is learned has much more there, its ranks have collapsed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.methods import DOCUMENT, between
from fedpeft.adapters.base_change import dense
from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.strategies import STRATEGIES
from fedpeft.strategies.base import AdapterStrategy

LAYER, SCALING = "layer", 1.0  # of clients of every rank
RANKS, RANK, SHARED = (2, 4, 8), 8, 2  # SHARED is the rank that all clients have
D_IN, D_OUT = 40, 24
STEPS, RATE = 10, 0.3
METHODS = [name for name, method in STRATEGIES.items() if method.capabilities.mixed_ranks]
MARK = "mixed ranks"


@dataclass(frozen=True)
class Learned:
    """What a method made of the target: its share of energy beyond the rank that all have, and how far it is off."""

    beyond: float
    missed: float


def target(seed: int) -> Tensor:
    """Return a matrix ``(D_OUT, D_IN)`` of norm 1 with RANK equal singular values."""
    random = np.random.default_rng(seed)
    U, V = (torch.linalg.qr(torch.from_numpy(random.standard_normal((d, RANK)))).Q for d in (D_OUT, D_IN))
    return U @ V.T / RANK**0.5


def trained(f: LoraFactors, wanted: Tensor) -> LoraFactors:
    """Take STEPS steps of gradient descent on |s B A - wanted|^2 / 2."""
    A, B, s = f.A, f.B, f.scaling
    for _ in range(STEPS):
        residual = s * (s * B @ A - wanted)  # (d_out, d_in)
        A, B = A - RATE * B.T @ residual, B - RATE * residual @ A.T
    return replace(f, A=A, B=B)


def begun(seed: int, rank: int) -> AdapterState:
    """Return an adapter as a run begins with it: A drawn, B zero."""
    A = torch.from_numpy(np.random.default_rng([seed, 1]).standard_normal((rank, D_IN))) / D_IN**0.5
    return AdapterState({LAYER: LoraFactors(A, torch.zeros(D_OUT, rank, dtype=torch.float64), SCALING)})


def learn(name: str, seed: int, rounds: int, options: dict[str, object] | None = None) -> Learned:
    """Run a federation of one layer."""
    wanted = target(seed)
    method: AdapterStrategy = STRATEGIES[name](
        seed=seed, scaling=SCALING, scaling_of=lambda rank: SCALING, ranks=RANKS, measure_error=False, **(options or {})
    )
    state = begun(seed, RANK)
    for server_round in range(1, rounds + 1):
        base = dense(state.base[LAYER]) if LAYER in state.base else torch.zeros_like(wanted)
        updates = [
            ClientUpdate(str(k), 1, {LAYER: trained(_view(method, state, rank), wanted - base)})
            for k, rank in enumerate(RANKS)
        ]
        state = method.aggregate(iter(updates), state, server_round)
    base = dense(state.base[LAYER]) if LAYER in state.base else torch.zeros_like(wanted)
    product = base + state.factors[LAYER].product()
    energy = torch.linalg.svdvals(product).square()
    return Learned(float(energy[SHARED:].sum() / energy.sum()), float((product - wanted).norm() / wanted.norm()))


def _view(method: AdapterStrategy, state: AdapterState, rank: int) -> LoraFactors:
    return method.view(state, rank, SCALING).factors[LAYER]


def table(rounds: int, seeds: int, tell: Callable[[str], None] = print) -> str:
    """Return the Markdown table of all methods that merge mixed ranks."""
    lines = ["| method | energy beyond rank 2 | distance to the target |", "| --- | ---: | ---: |"]
    lines.append(f"| the target | {1 - SHARED / RANK:.2f} | 0 |")
    rows = [(name, {}) for name in METHODS] + [("florist", {"padding": True, "threshold": 0.99})]
    for name, options in rows:
        found = [learn(name, seed, rounds, options) for seed in range(seeds)]
        label = f"{name}:" + ",".join(f"{k}={str(v).lower()}" for k, v in options.items()) if options else name
        beyond, missed = ([getattr(each, key) for each in found] for key in ("beyond", "missed"))
        lines.append(f"| {label} | {statistics.fmean(beyond):.2f} | {statistics.fmean(missed):.2f} |")
        tell(lines[-1])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all methods, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    asked = parser.parse_args(arguments)
    made = table(asked.rounds, asked.seeds)
    text = asked.document.read_text(encoding="utf-8")
    asked.document.write_text(between(text, MARK, made), encoding="utf-8")


if __name__ == "__main__":
    main()
