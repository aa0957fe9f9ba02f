"""LoRA-SB's layers: a square R trained between fixed factors, W = W0 + s B R A.

PEFT has no such layer, but its LoRA layers compute B(A(x)) with whatever modules they hold: A is replaced by a linear
layer that multiplies with R as well. R is an `nn.Linear` of its own, so that hooks on linear layers see it.

A and B are the top singular vectors of W0, as in LoRA-XS: they need no data. LoRA-SB itself takes them from the first
gradients, which would be a release of private rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

R_IN_PEFT = ".lora_A.default.R."  # what PEFT makes of the name of R


class ProjectionThenR(nn.Linear):
    """The map x to R (A x), whose own weight is A.

    Parameters
    ----------
    A : Tensor
        Shape ``(r, d_in)``; R is ``(r, r)`` and starts at zero.
    """

    def __init__(self, A: Tensor) -> None:
        rank, d_in = A.shape
        super().__init__(d_in, rank, bias=False, device=A.device)
        self.weight.data = A
        self.R = nn.Linear(rank, rank, bias=False, device=A.device)
        nn.init.zeros_(self.R.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with A, then with R."""
        return cast(Tensor, self.R(super().forward(x)))


def singular_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A = V_r^T ``(r, d_in)`` and B = U_r ``(d_out, r)`` of W ``(d_out, d_in)``, in float32.

    The sign of a pair of singular vectors is free: the entry of largest magnitude in each column of U is made positive.
    """
    U, _, Vt = torch.linalg.svd(W.detach().to("cpu", torch.float64), full_matrices=False)
    U, Vt = U[:, :rank], Vt[:rank]
    signs = torch.gather(U, 0, U.abs().argmax(dim=0, keepdim=True)).sign()  # (1, r)
    return (signs.T * Vt).float().contiguous(), (signs * U).float().contiguous()


def install(model: PeftModel) -> None:
    """Turn all LoRA layers of a model into LoRA-SB's."""
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        weight = cast(Any, layer).get_base_layer().weight
        A, B = singular_factors(weight.T if cast(Any, layer).fan_in_fan_out else weight, layer.r["default"])
        layer.lora_A["default"] = ProjectionThenR(A.to(weight.device))
        layer.lora_B["default"].weight.data = B.to(weight.device)
