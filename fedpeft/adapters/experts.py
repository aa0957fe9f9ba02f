"""Factors of stacked experts: what PEFT saves for parameters that it was told of by ``target_parameters``.

PEFT keeps a stack of E experts in one pair of matrices. A is ``(E r, d_in)``, expert after expert, and B is
``(d_out, r E)``, rank after rank: expert e's update is ``s B[:, e::E] @ A[e r : (e + 1) r]``. Only one pair for each
expert is a product that methods can merge, so they are taken apart when read, and put together when written.

Several parameters of one module lie inside each other, as ``experts`` and ``experts.base_layer``. Which is which only
the model tells: they must have one rank and one scaling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedpeft.adapters.state import LoraFactors

EXPERT = re.compile(r"^(.*)#(\d+)$")  # the name of one expert's layer


def is_stack(layer: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a layer, named as in the base model, is a parameter that the configuration targets."""
    return bool(_parameters(layer, config))


def pattern_names(layer: str, config: Mapping[str, Any]) -> list[str]:
    """Return the names that PEFT looks for in its patterns: the layer's, or those of a module's targeted parameters."""
    return _parameters(layer, config) or [bare(layer)]


def bare(layer: str) -> str:
    """Return a layer's name in the base, without the mark of an expert or an embedding."""
    return layer.partition("#")[0]


def _parameters(layer: str, config: Mapping[str, Any]) -> list[str]:
    found = EXPERT.match(layer)
    module = (found[1] if found else layer).replace(".base_layer", "")
    targets = [str(target).rpartition(".") for target in sorted(config.get("target_parameters") or ())]
    return [f"{module}.{name}" for owner, _, name in targets if module == owner or module.endswith(f".{owner}")]


def split(layer: str, A: Tensor, B: Tensor, rank: int, scaling: float) -> dict[str, LoraFactors]:
    """Return the factors of each expert, by the layer's name, ``#`` and the expert's number.

    Parameters
    ----------
    layer : str
        The stack's name.
    A : Tensor
        Of shape ``(E r, d_in)``.
    B : Tensor
        Of shape ``(d_out, r E)``.
    rank : int
        r, of every expert.
    scaling : float
        Of every expert.
    """
    count = A.shape[0] // rank
    by_expert = A.reshape(count, rank, A.shape[1])
    return {
        f"{layer}#{number}": LoraFactors(by_expert[number], B[:, number::count], scaling) for number in range(count)
    }


def level(factors: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Give all experts of a module one rank and one scaling, by zeros and in B; other layers stay as they are."""
    leveled = dict(factors)
    for layers in _groups(factors, lambda stack: stack.replace(".base_layer", "")).values():
        rank, scaling = max(factors[name].rank for name in layers), factors[layers[0]].scaling
        for name in layers:
            f = factors[name]
            missing = rank - f.rank
            A = torch.cat([f.A, f.A.new_zeros(missing, f.A.shape[1])])
            B = torch.cat([f.B, f.B.new_zeros(f.B.shape[0], missing)], dim=1)
            leveled[name] = LoraFactors(A, B if f.scaling == scaling else B * (f.scaling / scaling), scaling)
    return leveled


def join(factors: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Put experts of equal ranks and scalings together as PEFT saves them; what `split` takes apart."""
    stacks = _groups(factors, lambda stack: stack)
    joined = {layer: f for layer, f in factors.items() if EXPERT.match(layer) is None}
    for stack, layers in stacks.items():
        parts = [factors[layer] for layer in layers]
        A = torch.cat([part.A for part in parts])  # (E r, d_in)
        B = torch.stack([part.B for part in parts], dim=2).flatten(1)  # (d_out, r, E) -> (d_out, r E)
        joined[stack] = LoraFactors(A, B, parts[0].scaling)
    return dict(sorted(joined.items()))


def _groups(factors: Mapping[str, LoraFactors], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Return the experts' names by what `key` makes of their stack's, in the order of their numbers."""
    numbered = [(found[1], int(found[2]), layer) for layer in factors if (found := EXPERT.match(layer))]
    groups: dict[str, list[str]] = {}
    for stack, _, layer in sorted(numbered):
        groups.setdefault(key(stack), []).append(layer)
    return groups
