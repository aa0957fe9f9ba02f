"""PEFT's LoRA on a stack of experts, with a pair of factors of each expert's own.

PEFT holds the factors of all E experts in one pair of matrices, see `fedpeft.adapters.experts`. Here each expert has
its own, under the stack's name, ``#`` and its number: what optimisers, clipping and methods do to a layer they do to an
expert, and ranks change without a thought of how PEFT lays them out. What is computed is what PEFT computes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import pad

from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX

ADAPTER = "default"


class StackedExperts(ParamWrapper):  # type: ignore[misc]  # PEFT has no types
    """PEFT's layer around a module that holds a stack of experts' weights, ``(E, d_out, d_in)`` or transposed."""

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Return what makes the update of the stack, ``scaling * left @ right``.

        Parameters
        ----------
        adapter_name : str
            PEFT's.

        Returns
        -------
        left, right : Tensor
            ``(E, d_out, r)`` and ``(E, r, d_in)``; where the model holds its weights as ``(E, d_in, d_out)``, the
            transposes, the other way round. Experts of smaller ranks are filled up with zeros.
        scaling : float
            Of every expert.
        """
        pairs = list(zip(self.lora_A[adapter_name], self.lora_B[adapter_name], strict=True))
        rank = max(len(A) for A, _ in pairs)
        right = torch.stack([pad(A, (0, 0, 0, rank - len(A))) for A, _ in pairs])  # (E, r, d_in)
        left = torch.stack([pad(B, (0, rank - B.shape[1])) for _, B in pairs])  # (E, d_out, r)
        if self.is_transposed:
            left, right = right.mT, left.mT
        held = self.get_param().dtype
        return left.to(held), right.to(held), self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *_: Any, **__: Any) -> Tensor:
        """Return the update of the whole stack, of its shape."""
        left, right, scaling = self.get_delta_factors(adapter_name)
        return scaling * (left @ right)

    @property
    def is_transposed(self) -> bool:
        """Whether the model holds each expert's weight as ``(d_in, d_out)``."""
        return not self._did_swap_in_out_features

    @property
    def rank(self) -> int:
        """The largest of its experts' ranks."""
        return max(len(A) for A in self.lora_A[ADAPTER])

    def weights(self) -> list[Tensor]:
        """Return each expert's frozen weight, as a part of the stack that can be written to."""
        return list(self.get_param().data)


def part(model: nn.Module) -> None:
    """Give each expert of a model that PEFT has just adapted its own factors, with the values that PEFT drew."""
    for module in model.modules():
        if type(module) is not ParamWrapper:
            continue
        layer: Any = module
        count, rank = layer.num_experts, layer.r[ADAPTER]
        A, B = (factors[ADAPTER].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        by_expert = A.reshape(count, rank, -1)
        layer.lora_A[ADAPTER] = nn.ParameterList(nn.Parameter(each.clone()) for each in by_expert)
        layer.lora_B[ADAPTER] = nn.ParameterList(nn.Parameter(B[:, e::count].clone()) for e in range(count))
        layer.__class__ = StackedExperts


def live(model: nn.Module) -> dict[str, Tensor]:
    """Return the experts' factors by name, live."""
    return {
        f"{path}#{number}{suffix}": tensor
        for path, layer in model.named_modules()
        if isinstance(layer, StackedExperts)
        for suffix, held in ((A_SUFFIX, layer.lora_A[ADAPTER]), (B_SUFFIX, layer.lora_B[ADAPTER]))
        for number, tensor in enumerate(held)
    }
