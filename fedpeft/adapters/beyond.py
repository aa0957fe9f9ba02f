"""What of a base LoRA adapts beside linear layers, where a target names it: embeddings, and stacks of experts' weights.

transformers holds the experts of most mixtures as one parameter ``(E, d_out, d_in)``, no module which PEFT could wrap:
it takes their names as ``target_parameters``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import embedding

from fedpeft.adapters.base_change import MOVABLE
from fedpeft.adapters.kinds import KINDS, Role
from fedpeft.config import AdapterConfig
from fedpeft.errors import AdapterError
from fedpeft.models import BaseModel

PROBED = 8  # ids that an embedding is tried on


def in_head(base: BaseModel, name: str) -> bool:
    """Tell whether a module or parameter is of the base's head."""
    return any(name == head or name.startswith(f"{head}.") for head in base.head)


def expert_stacks(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Return the parameters that hold two or more experts' weights, by full name, with ``(d_out, d_in)`` of each."""
    found = {}
    for name, tensor in base.model.named_parameters():
        owner, _, _ = name.rpartition(".")
        module = base.model.get_submodule(owner)
        several = tensor.ndim == 3 and len(tensor) > 1 and tensor.dtype in MOVABLE
        if several and _of_experts(name, module) and not in_head(base, name):
            rows, columns = tensor.shape[1:]
            found[name] = (columns, rows) if getattr(module, "is_transposed", False) else (rows, columns)
    return found


def _of_experts(name: str, module: nn.Module) -> bool:
    return "experts" in name.split(".") or "experts" in type(module).__name__.lower()


def embeddings(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Return the embeddings outside the head by full name, with ``(d, vocabulary)``: as of a linear layer."""
    return {
        name: (module.embedding_dim, module.num_embeddings)
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Embedding) and not in_head(base, name)
    }


def shared_weights(base: BaseModel, names: Collection[str]) -> list[str]:
    """Return which of some modules are a language model's embeddings or output layer, where these are one weight."""
    model: Any = base.model
    output = model.get_output_embeddings()
    if output is None:  # many a model for images raises where it is asked for embeddings
        return []
    weights = [getattr(module, "weight", None) for module in (model.get_input_embeddings(), output)]
    if weights[0] is None or weights[0] is not weights[1]:
        return []
    # an adapted layer holds the module that it was put around
    held = [(name, getattr(model.get_submodule(name), "base_layer", model.get_submodule(name))) for name in names]
    return [name for name, module in held if getattr(module, "weight", None) is weights[0]]


def check_beyond(base: BaseModel, names: Collection[str], adapter: AdapterConfig) -> None:
    """Raise AdapterError for experts and embeddings that this adapter cannot take, or PEFT takes wrongly.

    Parameters
    ----------
    base : BaseModel
        The base.
    names : collection of str
        Of what `expert_stacks` and `embeddings` found.
    adapter : AdapterConfig
        Says how it is adapted.
    """
    if not names:
        return
    kind, init, stacks = adapter.facts, adapter.beginning, expert_stacks(base)
    first = next(iter(names))
    what = f"'{first}' is {'a stack of experts' if first in stacks else 'an embedding'}"
    if not kind.beyond_linear:
        able = ", ".join(sorted(name for name, each in KINDS.all().items() if each.beyond_linear))
        raise AdapterError(f"adapter.kind = '{kind.name}' adapts linear layers alone, and {what}. Allowed: {able}.")
    if init.name != kind.inits[0]:
        raise AdapterError(
            f"adapter.init = '{init.name}' is for linear layers alone, and {what}; leave adapter.init unset, or that "
            "out of adapter.targets."
        )
    if adapter.dropout:
        raise AdapterError(
            f"adapter.dropout = {adapter.dropout:g} drops inputs of linear layers, and {what}; leave it at 0."
        )
    tokens = [name for name in names if name not in stacks]
    if tokens and Role.A in kind.fixed:
        raise AdapterError(
            f"adapter.kind = '{kind.name}' keeps A as it is drawn, and of an embedding, such as '{tokens[0]}', A "
            "begins at zero: it would learn nothing. Leave it out of adapter.targets, or use adapter.kind = 'lora'."
        )
    for name in tokens:
        if problem := _problem(base, name):
            raise AdapterError(f"adapter.targets: PEFT cannot adapt the embedding '{name}', which {problem}.")


def _problem(base: BaseModel, name: str) -> str:
    """Return why an embedding is none that PEFT computes rightly, in words; empty if it is."""
    module = cast(nn.Embedding, base.model.get_submodule(name))
    places = Counter(id(each) for _, each in base.model.named_modules(remove_duplicate=False))
    if places[id(module)] > 1:
        return "has several places in the model, of which one alone would be adapted"
    if module.max_norm is not None:
        return "norms its rows"
    ids = torch.arange(min(PROBED, module.num_embeddings), device=module.weight.device)[None]
    with torch.no_grad():
        scale: Any = getattr(module, "embed_scale", 1.0)  # Gemma's, which PEFT knows
        plain = embedding(ids, module.weight) * scale
        try:
            given = module(ids)
        except (IndexError, RuntimeError, TypeError):
            given = None
    same = isinstance(given, Tensor) and given.shape == plain.shape and torch.allclose(given, plain.to(given.dtype))
    return "" if same else "does more than to look up rows"


def remarks(base: BaseModel, names: Collection[str]) -> Iterator[str]:
    """Say what a user should know of adapted experts and embeddings.

    Parameters
    ----------
    base : BaseModel
        The base, before it is adapted.
    names : collection of str
        Of all that is adapted.
    """
    stacks = expert_stacks(base).keys()
    if not stacks.isdisjoint(names):
        yield "experts are adapted one by one; no auxiliary loss balances what the router gives to each"
    for name in shared_weights(base, [name for name in names if name not in stacks]):
        yield (
            f"'{name}' is adapted by itself, though embeddings and output layer have one weight (tie_word_embeddings): "
            "fedpeft export --merged parts them, PEFT's merge_and_unload would change both"
        )


def part_shared(model: PeftModel) -> None:
    """Give a language model's output layer a weight of its own where its embeddings have the same and one is adapted.

    Merged into a weight that is both, either's update would change the other too.
    """
    inner: Any = model.get_base_model()
    if inner.get_output_embeddings() is None:
        return
    pair = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    if not any(isinstance(layer, BaseTunerLayer) for layer in pair):
        return
    given, output = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in pair)
    if output.weight is given.weight:
        output.weight = nn.Parameter(given.weight.detach().clone(), requires_grad=False)
        inner.config.tie_word_embeddings = inner.config.get_text_config().tie_word_embeddings = False
