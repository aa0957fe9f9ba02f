"""Layers with a square R trained between fixed factors, W = W0 + s B R A: those of LoRA-XS and LoRA-SB.

PEFT has no such layer, but its LoRA layers compute B(A(x)) with whatever modules they hold: A is replaced by a linear
layer that multiplies with R as well. R is an `nn.Linear` of its own, so that hooks on linear layers see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fedpeft.adapters.kinds.kind import Kind, Role
from fedpeft.adapters.kinds.lora import LORA

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


class Square(NamedTuple):
    """How one layer begins."""

    A: Tensor  # (r, d_in)
    R: Tensor  # (r, r)
    B: Tensor  # (d_out, r)


def square_kind(name: str, inits: tuple[str, ...], install: Any) -> Kind:
    """Return a kind of such layers."""
    return Kind(
        name=name,
        config=LORA.config,
        update="square",
        parts=(*LORA.parts, "lora_R"),
        alpha=LORA.alpha,
        dropout=LORA.dropout,
        init=LORA.init,
        settings=LORA.settings,
        inits=inits,
        fixed=frozenset({Role.A, Role.B}),
        row_by_row=True,
        resizable=True,
        reads_base=True,
        quantised=True,
        names={".lora_A.default.R.": ".lora_R."},  # what PEFT makes of the name of R
        install=install,
    )


def singular_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U_r ``(d_out, r)``, S_r ``(r,)`` and V_r^T ``(r, d_in)`` of W ``(d_out, d_in)``, in float64 on the CPU.

    The sign of a pair of singular vectors is free: the entry of largest magnitude in each column of U is made positive.
    """
    import torch

    U, S, Vt = torch.linalg.svd(W.detach().to("cpu", torch.float64), full_matrices=False)
    U, Vt = U[:, :rank], Vt[:rank]
    signs = torch.gather(U, 0, U.abs().argmax(dim=0, keepdim=True)).sign()  # (1, r)
    return signs * U, S[:rank], signs.T * Vt


def install_squares(model: PeftModel, begin: Callable[[str, Tensor, int, float], Square]) -> None:
    """Turn all LoRA layers of a model into such layers, in place.

    Parameters
    ----------
    model : PeftModel
        Changed in place.
    begin : callable
        Returns how a layer begins, by its name in the base, weight ``(d_out, d_in)``, rank and scaling.
    """
    from peft.tuners.lora import LoraLayer

    from fedpeft.quantization import dense_weight

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for path, module in layers:
        layer: Any = module
        W = dense_weight(layer.get_base_layer())
        A, R, B = begin(path.removeprefix("base_model.model."), W, layer.r["default"], layer.scaling["default"])
        layer.lora_A["default"] = projection_then_r(A.to(W.device), R.to(W.device))
        layer.lora_B["default"].weight.data = B.to(W.device)


def projection_then_r(A: Tensor, R: Tensor) -> Any:
    """Return the map x to R (A x), a linear layer whose own weight is A ``(r, d_in)``, with R ``(r, r)`` inside."""
    from torch import nn

    class ProjectionThenR(nn.Linear):
        R: nn.Linear

        def forward(self, x: Tensor) -> Tensor:
            product: Tensor = self.R(super().forward(x))
            return product

    rank, d_in = A.shape
    layer = ProjectionThenR(d_in, rank, bias=False, device=A.device)
    layer.weight.data = A
    layer.R = nn.Linear(rank, rank, bias=False, device=A.device)
    layer.R.weight.data = R
    return layer
