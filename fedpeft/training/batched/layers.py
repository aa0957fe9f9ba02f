"""The layers of a resident model through which each client's rows can go with that client's own tensors.

An adapted linear layer computes ``W x + s_n B_n A_n x`` for the rows of client n, a trained head ``W_n x + b_n``:
batched products over stacks of the clients' tensors, in place of one product of a single client's. It is the training
twin of what S-LoRA does to serve many adapters (Y. Sheng et al., arXiv 2311.03285).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX, Role, role_of
from fedpeft.errors import AdapterError
from fedpeft.quantization import held_as

ADAPTER = "default"  # PEFT's name of the one adapter
Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class _Layer:
    """A layer that each client has tensors of its own for.

    Parameters
    ----------
    module : nn.Module
        PEFT's layer, or a linear layer of the head.
    names : tuple of str
        A and B; or weight and, where it is the clients' too, bias.
    """

    module: nn.Module
    names: tuple[str, ...]


class OwnLayers:
    """Which layers of a resident model can be run with each client's own tensors.

    Parameters
    ----------
    adapted : AdaptedModel
        The model; nothing of it is changed.

    Attributes
    ----------
    refusal : str
        Why clients cannot be trained together on it, in words; empty if they can.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._layers = [*_factors(adapted), *_heads(adapted)]
        found = {name for layer in self._layers for name in layer.names}
        self.refusal = _refusal(adapted, found)

    @contextlib.contextmanager
    def with_stacks(self, stacks: Mapping[str, Tensor], scaling: Tensor) -> Iterator[None]:
        """Run the model with these tensors inside the block: G groups of rows, which lie behind each other.

        Parameters
        ----------
        stacks : mapping of str to Tensor
            ``(G, *shape)`` of every tensor of the adapter; of A and B, ranks that a group lacks are zeros.
        scaling : Tensor
            Of each group's update, ``(G,)``.
        """
        forwards: list[tuple[nn.Module, Forward]] = []
        for layer in self._layers:
            own = [stacks[name] for name in layer.names]
            is_lora = isinstance(layer.module, LoraLayer)
            forward = lora_forward(layer.module, own[0], own[1], scaling) if is_lora else head_forward(*own)
            forwards.append((layer.module, forward))
        with running(forwards):
            yield


@contextlib.contextmanager
def running(forwards: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Run modules by other forwards inside the block, and after it by those that they had."""
    before = [(module, vars(module).get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _factors(adapted: AdaptedModel) -> list[_Layer]:
    """Return PEFT's plain LoRA layers over plain linear ones."""
    found = []
    names = {id(adapted.parameter(name)): name for name in adapted.initial}
    for module in adapted.model.modules():
        if not isinstance(module, LoraLayer) or not is_linear(module) or ADAPTER not in module.lora_A:
            continue
        variants = getattr(module, "lora_variant", {})
        a, b = (names.get(id(each[ADAPTER].weight), "") for each in (module.lora_A, module.lora_B))
        plain = not variants
        if plain and a.endswith(A_SUFFIX) and b.endswith(B_SUFFIX):
            found.append(_Layer(module, (a, b)))
    return found


def is_linear(layer: BaseTunerLayer) -> bool:
    """Tell whether a layer is PEFT's LoRA over a linear layer, as it is or quantised."""
    base = layer.get_base_layer()
    return (isinstance(layer, LoraLinear) and type(base) is nn.Linear) or (
        isinstance(layer, LoraLayer) and held_as(base) is not None
    )


def _heads(adapted: AdaptedModel) -> list[_Layer]:
    """Return the linear layers whose own weights are the clients'."""
    names = {id(adapted.parameter(name)): name for name in adapted.initial if role_of(name) is Role.HEAD}
    found = []
    for module in adapted.model.modules():
        if type(module) is nn.Linear and id(module.weight) in names:
            own = [module.weight, *([] if module.bias is None else [module.bias])]
            if all(id(tensor) in names for tensor in own):
                found.append(_Layer(module, tuple(names[id(tensor)] for tensor in own)))
    return found


def _refusal(adapted: AdaptedModel, found: set[str]) -> str:
    if adapted.kind.update != "product":
        return f"adapter.kind = '{adapted.kind.name}' is no plain product of two factors at linear layers"
    if others := sorted(adapted.initial.keys() - found):
        return f"the adapter has '{others[0]}', which belongs to no plain linear layer"
    return ""


def drop_rates(module: nn.Module) -> list[tuple[str, float]]:
    """Return what of a module is a rate of dropping something: numbers named so, and the p of dropout layers."""
    dropout = "dropout" in type(module).__name__.lower()
    return [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or "jitter" in name or (dropout and name == "p"))
    ]


def drops(model: nn.Module) -> bool:
    """Tell whether a model in training draws masks of dropout, which a batch of clients cannot draw for each."""
    return any(rate > 0 for module in model.modules() for _, rate in drop_rates(module))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return ``(b, ..., d)`` as ``(groups, b / groups ..., d)``."""
    if x.shape[0] % groups:
        raise AdapterError(f"a layer is given {x.shape[0]} entries where {groups} groups of rows are: it mixes rows")
    return x.reshape(groups, -1, x.shape[-1])


def lora_forward(module: nn.Module, A: Tensor, B: Tensor, scaling: Tensor) -> Forward:
    """Return a forward of PEFT's layer: its base, and G groups' own updates.

    Parameters
    ----------
    module : nn.Module
        A plain LoRA layer.
    A, B : Tensor
        ``(G, r, d_in)`` and ``(G, d_out, r)``.
    scaling : Tensor
        ``(G,)``.
    """
    layer = cast(Any, module)
    base: nn.Module = layer.get_base_layer()
    by = scaling[:, None, None]  # (G, 1, 1)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = base(x, *args, **kwargs)
        grouped = _grouped(x.to(A.dtype), len(A))  # (G, m, d_in)
        update = torch.bmm(torch.bmm(grouped, A.mT), B.mT) * by  # (G, m, d_out)
        return (result + update.view(result.shape)).to(result.dtype)

    return forward


def head_forward(weight: Tensor, bias: Tensor | None = None) -> Forward:
    """Return a forward of a linear layer with G groups' own weights, ``(G, d_out, d_in)`` and ``(G, d_out)``."""

    def forward(x: Tensor) -> Tensor:
        grouped = _grouped(x, len(weight))  # (G, m, d_in)
        result = torch.bmm(grouped, weight.mT)
        if bias is not None:
            result = result + bias[:, None]
        return result.view(*x.shape[:-1], weight.shape[1])

    return forward


def stacked(tensors: Sequence[Tensor], like: Tensor, role: Role) -> Tensor:
    """Return the clients' own tensors as one, ``(N, *shape)``: smaller ranks are filled up with zeros.

    The gradient of such a rank of A goes through B's zeros, and the other way round: they stay.

    Parameters
    ----------
    tensors : sequence of Tensor
        Of N clients.
    like : Tensor
        Gives type and device.
    role : Role
        Which dimension is the rank.
    """
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        return first.to(like).expand(len(tensors), *first.shape)
    ranks = [tensor.shape for tensor in tensors]
    if len(set(ranks)) == 1:
        return torch.stack([tensor.to(like) for tensor in tensors])
    axis = {Role.A: 0, Role.B: 1}[role]
    shape = list(first.shape)
    shape[axis] = max(each[axis] for each in ranks)
    whole = like.new_zeros((len(tensors), *shape))
    for own, tensor in zip(whole, tensors, strict=True):
        own.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return whole


def unstacked(own: Tensor, shape: Sequence[int]) -> Tensor:
    """Return one client's tensor of a stack at its own rank."""
    for axis, size in enumerate(shape):
        own = own if own.shape[axis] == size else own.narrow(axis, 0, size)
    return own
