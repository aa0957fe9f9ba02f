"""The types that adapters are spoken of in, on both sides of the federation.

Tensors travel and are stored under PEFT's own names (``<layer>.lora_A.weight``, ``<layer>.lora_B.weight``, and the full
name of every other trained tensor), so that what a run saves is what PEFT loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from fedpeft.adapters.kinds import Role as Role
from fedpeft.adapters.kinds.names import is_of_a_kind

A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"
R_SUFFIX = ".lora_R.weight"  # the square matrix of LoRA-XS and LoRA-SB, between fixed factors
# change of a layer's frozen weight before the last round, and in it
BASE_EARLIER, BASE_LAST = ".base_earlier", ".base_last"
BASE_A, BASE_B, BASE_DENSE = ".A", ".B", ".weight"


@lru_cache(maxsize=65536)  # it is asked of every tensor of every message
def role_of(name: str) -> Role:
    """Return the role of a tensor by its name.

    Raises
    ------
    AdapterError
        It is a tensor of an adapter that no registered kind claims.
    """
    for suffix, role in ((A_SUFFIX, Role.A), (B_SUFFIX, Role.B), (R_SUFFIX, Role.R)):
        if name.endswith(suffix):
            return role
    if BASE_EARLIER in name or BASE_LAST in name:
        return Role.BASE
    return Role.PARAMETER if is_of_a_kind(name) else Role.HEAD


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
    R : Tensor, optional
        Of LoRA-XS and LoRA-SB, between B and A, shape ``(r, r)``: then the update is ``scaling * B @ R @ A``.
    """

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    scaling: float
    R: Tensor | None = None  # (r, r)

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    def product(self) -> Tensor:
        """Return the dense update ``scaling * B @ A``, shape ``(d_out, d_in)``; for tests and small layers."""
        plain = self.plain()
        return plain.scaling * (plain.B @ plain.A)

    def plain(self) -> LoraFactors:
        """Return the same update without R, which is multiplied into A."""
        return self if self.R is None else LoraFactors(self.R @ self.A, self.B, self.scaling)


@dataclass(frozen=True)
class BaseChange:
    """How far one layer's frozen weight has moved, as factors of scaling 1 or, where that is smaller, dense.

    Parameters
    ----------
    earlier : LoraFactors or Tensor or None
        Before the last round; a Tensor is ``(d_out, d_in)``.
    last : LoraFactors or Tensor or None
        In the last round.
    """

    earlier: LoraFactors | Tensor | None = None
    last: LoraFactors | Tensor | None = None


@dataclass(frozen=True)
class AdapterState:
    """An adapter: factors by layer, the other trained tensors by name, and what became of the base.

    Parameters
    ----------
    factors : mapping of str to LoraFactors
        By layer.
    dense : mapping of str to Tensor
        Every other trained tensor, such as a classifier head.
    base : mapping of str to BaseChange
        By layer, for methods that change the base; empty else.
    """

    factors: Mapping[str, LoraFactors]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, BaseChange] = field(default_factory=dict)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scaling: float) -> AdapterState:
        """Group tensors named as PEFT names them; the order of layers is that of their names."""
        layers = sorted(name.removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX))
        factors = {
            layer: LoraFactors(
                tensors[layer + A_SUFFIX], tensors[layer + B_SUFFIX], scaling, tensors.get(layer + R_SUFFIX)
            )
            for layer in layers
        }
        grouped = (Role.A, Role.B, Role.R, Role.BASE)
        return cls(
            factors,
            {name: tensors[name] for name in sorted(tensors) if role_of(name) not in grouped},
            base_changes(tensors),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors under PEFT's names; what `from_tensors` reads."""
        tensors = dict(self.adapter_tensors())
        for layer, change in self.base.items():
            for part, piece in ((BASE_EARLIER, change.earlier), (BASE_LAST, change.last)):
                if isinstance(piece, LoraFactors):
                    tensors |= {layer + part + BASE_A: piece.A, layer + part + BASE_B: piece.B}
                elif piece is not None:
                    tensors[layer + part + BASE_DENSE] = piece
        return tensors

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return the tensors under PEFT's names, without changes of the base."""
        tensors: dict[str, Tensor] = {}
        for layer, f in self.factors.items():
            tensors[layer + A_SUFFIX] = f.A
            tensors[layer + B_SUFFIX] = f.B
            if f.R is not None:
                tensors[layer + R_SUFFIX] = f.R
        return tensors | dict(self.dense)


def base_changes(tensors: Mapping[str, Tensor]) -> dict[str, BaseChange]:
    """Return the changes of the base among named tensors, by layer."""
    layers = {name.split(part)[0] for name in tensors for part in (BASE_EARLIER, BASE_LAST) if part in name}
    return {
        layer: BaseChange(_change(tensors, layer + BASE_EARLIER), _change(tensors, layer + BASE_LAST))
        for layer in sorted(layers)
    }


def _change(tensors: Mapping[str, Tensor], stem: str) -> LoraFactors | Tensor | None:
    if stem + BASE_A in tensors:
        return LoraFactors(tensors[stem + BASE_A], tensors[stem + BASE_B], 1.0)
    return tensors.get(stem + BASE_DENSE)


@dataclass(frozen=True)
class PrivacyClaim:
    """What a client says that its record-level privacy has cost in this run so far, repeats included.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the sensitivity.
    sample_rate : float
        Chance of each row to be in a step.
    steps : int
        Of the whole run so far.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True)
class TrainMetrics:
    """What a client says of its training, as far as it may.

    Parameters
    ----------
    steps : int, optional
        Optimiser steps of this round.
    loss : float, optional
        Mean over the steps, in nats.
    seconds : float, optional
        Wall time.
    spent : PrivacyClaim, optional
        Under record-level privacy with public counts.
    rate_sum : float, optional
        Sum of the learning rates of the steps, where a method has control variates.
    control_lost : bool
        Whether the client did not hold the control variate that it was asked to go on from.
    """

    steps: int | None = None
    loss: float | None = None
    seconds: float | None = None
    spent: PrivacyClaim | None = None
    rate_sum: float | None = None
    control_lost: bool = False


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
    metrics : TrainMetrics
        What the client says of its training.
    """

    client_id: str
    num_examples: int
    factors: Mapping[str, LoraFactors]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: TrainMetrics = TrainMetrics()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes, types and bytes, independent of the mapping's order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that the tensors' values take on the wire."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
