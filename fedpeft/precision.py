"""Which precision a base is best held in on this machine: a rule of hardware for runs, a timing for advice."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    import torch

HALVES = ("bf16", "fp16")  # values of ``train.precision`` that hold the base in two bytes a weight
SHORTEST = 1e-3  # seconds of a step's products below which their time says nothing: the rest of a step takes longer


def dtype_of(precision: str) -> torch.dtype:
    """Return in what a base is held under a ``train.precision``."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def arithmetic(on: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a model runs on a device under a ``train.precision``."""
    import torch

    short = precision in HALVES
    return torch.autocast(on.type, dtype_of(precision) if short else torch.bfloat16, enabled=short)


def dtype_on(on: torch.device, precision: str) -> torch.dtype:
    """Return in what a base is held on a device, or raise ConfigError for fp16 on a CPU, which is slow at it."""
    if precision == "fp16" and on.type == "cpu":
        raise ConfigError(
            "train.precision = 'fp16' is for GPUs, and there is none here. Allowed on a CPU: fp32, or bf16 where it "
            "has AMX or AVX512-BF16; auto chooses."
        )
    return dtype_of(precision)


def of_hardware() -> str:
    """Return ``"bf16"`` where this machine multiplies bf16 in hardware, else ``"fp32"``.

    On a GPU its own unit, on a CPU AMX or AVX512-BF16: with either bf16 was measured to win, and without both to lose.
    """
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"


@dataclass(frozen=True)
class Timing:
    """What the matrix products of a forward pass take in either precision, on this process's threads.

    Parameters
    ----------
    fp32, bf16 : float
        Seconds.
    """

    fp32: float
    bf16: float

    @property
    def better(self) -> str | None:
        """The faster one; None if they hardly differ, or if products are too short to matter."""
        if max(self.fp32, self.bf16) < SHORTEST or 0.8 < self.fp32 / self.bf16 < 1.25:
            return None
        return "bf16" if self.bf16 < self.fp32 else "fp32"


def time_products(shapes: Iterable[tuple[int, int]], rows: int, seconds: float = 0.5) -> Timing:
    """Time a model's products in both precisions, in turns; no run's bytes follow from it.

    Parameters
    ----------
    shapes : iterable of tuple of int
        ``(d_out, d_in)`` of every linear layer.
    rows : int
        Tokens or patches of a batch.
    seconds : float
        At most about so long in each precision, once each was tried.
    """
    import torch

    counts: dict[tuple[int, int], int] = {}
    for shape in shapes:
        counts[shape] = counts.get(shape, 0) + 1
    total = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for (d_out, d_in), count in counts.items():
        for kind in total:
            x, weight = torch.ones(rows, d_in, dtype=kind), torch.ones(d_out, d_in, dtype=kind)
            total[kind] += count * _fastest(x, weight, seconds / len(counts))
    return Timing(total[torch.float32], total[torch.bfloat16])


def _fastest(x: torch.Tensor, weight: torch.Tensor, seconds: float) -> float:
    import torch

    best, end = float("inf"), time.perf_counter() + seconds
    torch.nn.functional.linear(x, weight)
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return best
