"""LoRA's update of a linear layer in one step of autograd, with no casts and no products that nobody needs.

PEFT computes ``base(x) + B(A(dropout(x))) * scaling`` one operation after the other: under a bf16 base it casts every
input to float32 and autocast casts it back, scaling and sum are passes of their own over the output, and backward adds
the input's two gradients in another. Here the sum happens inside the products, forward and backward:

    y  = x W' + c;   h = x A';   y += h (s B)'          gh = g (s B);   gx = g W;   gx += gh A

The numbers are PEFT's up to the order of sums. A layer that does more than that, or whose parts are watched by hooks,
as in private training, goes PEFT's own way, and so does scoring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ADAPTER = "default"


class _LoraLinear(torch.autograd.Function):
    """Apply a frozen linear layer and its update."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, c: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """Return ``x W' + c + scaling x A' B'``.

        Parameters
        ----------
        ctx : object
            Autograd's.
        x : Tensor
            ``(..., d_in)``.
        W, c : Tensor
            ``(d_out, d_in)`` and ``(d_out,)`` or None, of x's type: frozen.
        A, B : Tensor
            ``(r, d_in)`` and ``(d_out, r)``.
        scaling : float
            Of the update.
        """
        rows = x.reshape(-1, x.shape[-1])  # (n, d_in)
        down, up = A.to(x.dtype), (B * scaling).to(x.dtype)
        h = rows @ down.t()  # (n, r)
        y = rows @ W.t() if c is None else torch.addmm(c, rows, W.t())  # (n, d_out)
        y.addmm_(h, up.t())
        ctx.save_for_backward(rows if A.requires_grad else None, W, down, up, h if B.requires_grad else None)
        ctx.scaling, ctx.shape, ctx.types = scaling, x.shape, (A.dtype, B.dtype)
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        rows, W, down, up, h = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])  # (n, d_out)
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        of_h = g @ up if needs_x or needs_A else None  # (n, r)
        of_x = (g @ W).addmm_(of_h, down).view(ctx.shape) if needs_x else None
        of_A = (of_h.t() @ rows).to(ctx.types[0]) if needs_A and of_h is not None else None
        of_B = (g.t() @ h).to(ctx.types[1]).mul_(ctx.scaling) if needs_B else None
        return of_x, None, None, of_A, of_B, None


apply: Callable[..., Tensor] = _LoraLinear.apply


class FusedLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's LoRA on a linear layer, which takes the short way wherever it computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's layer returns, up to the order of sums."""
        kind = _computed_in(self, x)
        if args or kwargs or kind is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        base: Any = self.base_layer
        A, B = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = apply(x.to(kind), base.weight, base.bias, A, B, self.scaling[ADAPTER])
        return y


def fuse(model: nn.Module) -> int:
    """Let the LoRA layers of a model take the short way wherever it computes the same; return how many may.

    Parameters
    ----------
    model : torch.nn.Module
        Adapted by PEFT; its layers change their class, which copies of them keep.
    """
    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.__class__ = FusedLinear
    return len(layers)


def _computed_in(layer: Any, x: Tensor) -> torch.dtype | None:
    """Return the type that the short way computes in; None where PEFT's own has to be taken."""
    if not torch.is_grad_enabled():  # scores must not depend on whether this process's model carries hooks
        return None
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or list(layer.active_adapters) != [ADAPTER] or layer.lora_variant:
        return None
    if type(base) is not nn.Linear or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    parts = (base, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.lora_dropout[ADAPTER])
    plain = [type(each) for each in parts] == [nn.Linear, nn.Linear, nn.Linear, nn.Identity] and parts[2].bias is None
    if not plain or any(each._forward_hooks or each._forward_pre_hooks or each._backward_hooks for each in parts):
        return None
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return kind if base.weight.dtype == kind and x.is_floating_point() else None
