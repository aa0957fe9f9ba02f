"""LoRA-SB: R between singular vectors of the first step along the gradient.

K. Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning", arXiv 2411.19557. With U S V^T the first step that training all of W0 would make, cut to r ranks,

    B = U_r,    A = V_r^T,    R = S_r / s,

so that s B R A is the best approximation of that step, and the gradient of R is s B^T G A^T. B^T B = A A^T = I. The
update is not zero at the start: it is the first step, and stays in what is averaged and saved. G is the mean gradient
over public rows; the step is -lr G of sgd, and -lr G / (|G| + eps) of adamw, which but for eps is the -lr sign(G) of
the authors' code. What differs from that code besides: it divides lr by the steps of its warm-up, of which there is
none here, and rounds the factors to bfloat16, which makes them no longer orthonormal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft.adapters.kinds.kind import Init, Start
from fedpeft.adapters.kinds.square import Square, install_squares, singular_factors, square_kind
from fedpeft.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


def first_steps(start: Start) -> dict[str, Tensor]:
    """Return the first step that training all of each target's weight on public rows would make, by its name."""
    import torch
    from transformers.pytorch_utils import Conv1D

    model: Any = start.model
    names = list(getattr(start.settings, "target_modules", None) or ())
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    weights = [module.weight for module in modules.values()]
    sums = [torch.zeros_like(weight, dtype=torch.float64, device="cpu") for weight in weights]
    sizes = [next(iter(batch.values())).shape[0] for batch in start.batches]
    with _trainable(weights):
        for batch, rows in zip(start.batches, sizes, strict=True):
            gradients = torch.autograd.grad(start.loss(batch), weights, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient.to("cpu", torch.float64), alpha=rows)
    steps = {}
    for (name, module), total in zip(modules.items(), sums, strict=True):
        if not total.isfinite().all() or not total.any():
            raise AdapterError(
                f"adapter.init = 'lora-sb-gradient': layer '{name}' got no finite gradient from adapter.init_data = "
                f"'{start.rows}'; leave it out of adapter.targets, or give other rows."
            )
        G = total / sum(sizes)
        steps[name] = start.first_step(G.T if isinstance(module, Conv1D) else G)
    return steps


@contextlib.contextmanager
def _trainable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let frozen weights have gradients inside the block."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def install(model: PeftModel, start: Start, steps: Mapping[str, Tensor]) -> None:
    """Begin every layer at the best approximation of its first step in r ranks."""
    import torch

    def begin(layer: str, W: Tensor, rank: int, scaling: float) -> Square:
        U, S, Vt = singular_factors(steps[layer], rank)
        return Square(Vt.float().contiguous(), torch.diag(S / scaling).float(), U.float().contiguous())

    install_squares(model, begin)


LORA_SB = square_kind("lora-sb", ("lora-sb-gradient",), install)
LORA_SB_GRADIENT = Init(
    name="lora-sb-gradient",
    value=True,  # replaced by `install`
    from_data=True,
    of_gradients=True,
    kind="lora-sb",
    begins="at a gradient",
    instead="adapter.kind = 'lora-xs'",
    prepare=first_steps,
)
