"""The layers of LoRA-XS and LoRA-SB: a square R trained between fixed factors, W = W0 + s B R A.

PEFT has no such layer, but its LoRA layers compute B(A(x)) with whatever modules they hold: A is replaced by a linear
layer that multiplies with R as well. R is an `nn.Linear` of its own, so that hooks on linear layers see it.

K. Balazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604. With
W0 = U S V^T, cut to r ranks,

    B = U_r,    A = S_r V_r^T,    R drawn from N(0, 1e-5^2).

No rows are needed.

K. Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning" (LoRA-SB), arXiv 2411.19557. With U S V^T the first step that training all of W0 would make, cut likewise,

    B = U_r,    A = V_r^T,    R = S_r / s,

so that s B R A is the best approximation of that step, and the gradient of R is s B^T G A^T. B^T B = A A^T = I. The
update is not zero at the start: it is the first step, and stays in what is averaged and saved. G is the mean gradient
over public rows; the step is -lr G of sgd, and -lr G / (|G| + eps) of adamw, which but for eps is the -lr sign(G) of
the authors' code. What differs from that code besides: it divides lr by the steps of its warm-up, of which there is
none here, and rounds the factors to bfloat16, which makes them no longer orthonormal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedpeft.adapters.state import LoraFactors
from fedpeft.seeds import generator

R_IN_PEFT = ".lora_A.default.R."  # what PEFT makes of the name of R
XS_DEVIATION = 1e-5  # of LoRA-XS's R


class ProjectionThenR(nn.Linear):
    """The map x to R (A x), whose own weight is A.

    Parameters
    ----------
    A : Tensor
        Shape ``(r, d_in)``.
    R : Tensor
        As it begins, shape ``(r, r)``.
    """

    def __init__(self, A: Tensor, R: Tensor) -> None:
        rank, d_in = A.shape
        super().__init__(d_in, rank, bias=False, device=A.device)
        self.weight.data = A
        self.R = nn.Linear(rank, rank, bias=False, device=A.device)
        self.R.weight.data = R

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with A, then with R."""
        return cast(Tensor, self.R(super().forward(x)))


def singular_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U_r ``(d_out, r)``, S_r ``(r,)`` and V_r^T ``(r, d_in)`` of W ``(d_out, d_in)``, in float64 on the CPU.

    The sign of a pair of singular vectors is free: the entry of largest magnitude in each column of U is made positive.
    """
    U, S, Vt = torch.linalg.svd(W.detach().to("cpu", torch.float64), full_matrices=False)
    U, Vt = U[:, :rank], Vt[:rank]
    signs = torch.gather(U, 0, U.abs().argmax(dim=0, keepdim=True)).sign()  # (1, r)
    return signs * U, S[:rank], signs.T * Vt


def xs_factors(W: Tensor, rank: int, scaling: float, seed: int, layer: str) -> LoraFactors:
    """Return how LoRA-XS begins.

    Parameters
    ----------
    W : Tensor
        The layer's weight W0, ``(d_out, d_in)``.
    rank : int
        r.
    scaling : float
        s.
    seed : int
        The run's seed, from which R is drawn.
    layer : str
        Name of the layer, which draws an R of its own.
    """
    U, S, Vt = singular_factors(W, rank)
    R = torch.from_numpy(generator(seed, "lora-xs", layer).normal(0.0, XS_DEVIATION, (rank, rank)))
    return LoraFactors((S[:, None] * Vt).float().contiguous(), U.float().contiguous(), scaling, R.float())


def sb_factors(step: Tensor, rank: int, scaling: float) -> LoraFactors:
    """Return how LoRA-SB begins: at the best approximation of a step ``(d_out, d_in)`` in r ranks."""
    U, S, Vt = singular_factors(step, rank)
    return LoraFactors(Vt.float().contiguous(), U.float().contiguous(), scaling, torch.diag(S / scaling).float())


def install(model: PeftModel, seed: int, steps: Mapping[str, Tensor] | None = None) -> None:
    """Turn all LoRA layers of a model into those of LoRA-SB or, where no steps are given, of LoRA-XS.

    Parameters
    ----------
    model : PeftModel
        Changed in place.
    seed : int
        The run's seed.
    steps : mapping of str to Tensor, optional
        The first step of each layer's weight, ``(d_out, d_in)``, by its name in the base.
    """
    for path, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]:
        name = path.removeprefix("base_model.model.")
        weight = cast(Any, layer).get_base_layer().weight
        rank, scaling = layer.r["default"], layer.scaling["default"]
        if steps is None:
            W = weight.T if cast(Any, layer).fan_in_fan_out else weight
            f = xs_factors(W, rank, scaling, seed, name)
        else:
            f = sb_factors(steps[name], rank, scaling)
        assert f.R is not None
        layer.lora_A["default"] = ProjectionThenR(f.A.to(weight.device), f.R.to(weight.device))
        layer.lora_B["default"].weight.data = f.B.to(weight.device)
