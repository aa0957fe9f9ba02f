"""The types that adapters are spoken of in, on both sides of the federation.

Tensors travel and are stored under PEFT's own names (``<layer>.lora_A.weight``, ``<layer>.lora_B.weight``, and the full
name of every other trained tensor), so that what a run saves is what PEFT loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"


class Role(StrEnum):
    """What a tensor of an adapter is: a factor, or a part of the head, which is all else."""

    A = "A"
    B = "B"
    HEAD = "head"


def role_of(name: str) -> Role:
    """Return the role of a tensor by its name."""
    return Role.A if name.endswith(A_SUFFIX) else Role.B if name.endswith(B_SUFFIX) else Role.HEAD


@dataclass(frozen=True)
class LoraFactors:
    """One adapted layer, whose update is ``scaling * B @ A``.

    Parameters
    ----------
    A : Tensor
        Down projection, shape ``(r, d_in)``.
    B : Tensor
        Up projection, shape ``(d_out, r)``.
    scaling : float
        alpha / r (alpha / sqrt(r) for rank-stabilised LoRA).
    """

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    scaling: float

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    def product(self) -> Tensor:
        """Return the dense update ``scaling * B @ A``, shape ``(d_out, d_in)``; for tests and small layers."""
        return self.scaling * (self.B @ self.A)


@dataclass(frozen=True)
class AdapterState:
    """An adapter: factors by layer, and the other trained tensors, such as a classifier head, by name."""

    factors: Mapping[str, LoraFactors]
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scaling: float) -> AdapterState:
        """Group tensors named as PEFT names them; the order of layers is that of their names."""
        layers = sorted(name.removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX))
        factors = {
            layer: LoraFactors(tensors[layer + A_SUFFIX], tensors[layer + B_SUFFIX], scaling) for layer in layers
        }
        paired = {layer + suffix for layer in layers for suffix in (A_SUFFIX, B_SUFFIX)}
        return cls(factors, {name: tensors[name] for name in sorted(tensors) if name not in paired})

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors under PEFT's names; what `from_tensors` reads."""
        tensors: dict[str, Tensor] = {}
        for layer, f in self.factors.items():
            tensors[layer + A_SUFFIX] = f.A
            tensors[layer + B_SUFFIX] = f.B
        return tensors | dict(self.dense)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends back.

    Parameters
    ----------
    client_id : str
        Stable name of the client: its value in the partition's column, or its number.
    num_examples : int
        Rows it trained on; its weight in means is num_examples over the cohort's sum.
    factors : mapping of str to LoraFactors
        Every adapted layer after training, a frozen A included.
    dense : mapping of str to Tensor
        Other trained tensors.
    metrics : mapping of str to float
        What the client reports, such as its mean loss.
    """

    client_id: str
    num_examples: int
    factors: Mapping[str, LoraFactors]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes, types and bytes, independent of the mapping's order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that the tensors' values take on the wire."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
