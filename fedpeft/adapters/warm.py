"""A run that begins with an adapter from a folder: what follows from it, and its tensors in place of the drawn ones.

The folder is any that PEFT's `save_pretrained` or a run has written and whose update is s B A of the untouched base. A
layer of a smaller rank than the largest keeps what is drawn for the missing rows of A, with zeros in B: the update is
the saved one, and the new ranks can learn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedpeft.adapters.embeddings import is_embedding
from fedpeft.adapters.experts import pattern_names
from fedpeft.adapters.export import PEFT_PREFIX, SavedAdapter, read_adapter
from fedpeft.adapters.kinds import KINDS
from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX, LoraFactors, fingerprint
from fedpeft.config import AdapterConfig, describe
from fedpeft.errors import AdapterError, ConfigError

BESIDE = re.compile(r"\.(embed_tokens|lm_head|base_layer)\.(weight|bias)$")  # what PEFT saves of the base's own


def followed(adapter: AdapterConfig) -> AdapterConfig:
    """Return the configuration with what follows from ``adapter.start`` spelled out.

    Raises
    ------
    AdapterError
        There is no such adapter, it is not s B A, or has changed since the run was made.
    ConfigError
        A key that is set says something else than the folder.
    """
    if adapter.start is None:
        return adapter
    saved, folder = _read(adapter), f"adapter.start = '{adapter.start}'"
    factors, given = saved.state.factors, adapter.model_fields_set
    implied: dict[str, object] = {"start_sha256": fingerprint(saved.state.adapter_tensors())}
    if "kind" not in given and saved.config.get("use_rslora"):
        implied["kind"] = next(name for name, each in KINDS.all().items() if each.settings.get("use_rslora"))
    widest = max(factors.values(), key=lambda f: f.rank)
    if "rank" in given and adapter.rank != widest.rank:
        raise ConfigError(f"adapter.rank = {adapter.rank}: {folder} has rank {widest.rank}; leave adapter.rank unset.")
    implied["rank"] = widest.rank
    if "targets" not in given and "layers" not in given:
        layers = [layer.removeprefix(PEFT_PREFIX) for layer in factors]
        implied["targets"] = sorted({name for layer in layers for name in pattern_names(layer, saved.config)})
    try:
        found = AdapterConfig.model_validate({**adapter.model_dump(exclude_unset=True), **implied})
        alpha = widest.scaling / found.facts.scaled(1.0, widest.rank)
        if "alpha" in given and not math.isclose(adapter.alpha, alpha, rel_tol=1e-6):
            raise ConfigError(f"adapter.alpha = {adapter.alpha:g}: {folder} has alpha {alpha:g}; leave it unset.")
        implied["alpha"] = adapter.alpha if "alpha" in given else round(alpha, 9)
        return AdapterConfig.model_validate({**adapter.model_dump(exclude_unset=True), **implied})
    except ValidationError as error:
        raise ConfigError(f"{folder}: {describe(error, 'adapter')}") from None


def _read(adapter: AdapterConfig) -> SavedAdapter:
    folder = Path(str(adapter.start)).expanduser()
    saved = read_adapter(folder)
    if adapter.start_sha256 not in (None, fingerprint(saved.state.adapter_tensors())):
        raise AdapterError(
            f"adapter.start = '{folder}' is not the adapter that this run was made with (adapter.start_sha256); put "
            "that one back, or begin another run."
        )
    return saved


def begin(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter: AdapterConfig,
    labels: Sequence[str],
    scoring: Collection[str],
) -> tuple[str, ...]:
    """Write the adapter of ``adapter.start`` into the one that has just been drawn; return what a user should know.

    Parameters
    ----------
    model : torch.nn.Module
        Adapted by PEFT.
    tensors : mapping of str to Tensor
        All of the adapter, live, by PEFT's names; changed in place.
    adapter : AdapterConfig
        What `followed` returned.
    labels : sequence of str
        The run's, in the order of their ids.
    scoring : collection of str
        Names of those of `tensors` that have one row a label.

    Raises
    ------
    AdapterError
        The folder's layers or their shapes are others than the run's.
    """
    saved = _without_base(_read(adapter), model, tensors)
    layers = {name.removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX)}
    if others := sorted(layers ^ saved.state.factors.keys()):
        here = others[0] in layers
        raise AdapterError(
            f"adapter.start = '{adapter.start}' {'does not adapt' if here else 'adapts'} layer "
            f"'{others[0].removeprefix(PEFT_PREFIX)}', which this run {'does' if here else 'does not'}; leave "
            "adapter.targets and adapter.layers unset, so that they follow from the folder."
        )
    for layer, f in saved.state.factors.items():
        _put(layer, f, tensors[layer + A_SUFFIX], tensors[layer + B_SUFFIX], adapter)
    heads = tensors.keys() - {layer + suffix for layer in layers for suffix in (A_SUFFIX, B_SUFFIX)}
    return _put_head(saved, {name: tensors[name] for name in sorted(heads)}, labels, scoring)


def _without_base(saved: SavedAdapter, model: nn.Module, tensors: Collection[str]) -> SavedAdapter:
    """Leave out what PEFT saves of the base beside adapted embeddings, which must be what the base holds."""
    kept = {}
    for name, tensor in saved.state.dense.items():
        try:
            held = None if name in tensors or BESIDE.search(name) is None else model.get_parameter(name)
        except AttributeError:
            held = None
        if held is None:
            kept[name] = tensor
        elif held.shape != tensor.shape or not (
            torch.equal(held.to(tensor.dtype).cpu(), tensor) or torch.equal(held.cpu(), tensor.to(held.dtype))
        ):
            raise AdapterError(
                f"adapter.start = '{saved.path}' holds '{name}' of its own, {tuple(tensor.shape)}, where the base has "
                f"{tuple(held.shape)} or other numbers: embeddings that were resized or trained. Give the base that "
                "they are in."
            )
    return replace(saved, state=replace(saved.state, dense=kept))


def _put(layer: str, f: LoraFactors, A: Tensor, B: Tensor, adapter: AdapterConfig) -> None:
    if f.rank > A.shape[0] or f.A.shape[1] != A.shape[1] or f.B.shape[0] != B.shape[0]:
        raise AdapterError(
            f"adapter.start = '{adapter.start}': A and B of layer {layer} are of shapes {tuple(f.A.shape)} and "
            f"{tuple(f.B.shape)}, and this run's of {tuple(A.shape)} and {tuple(B.shape)}; it is of another model."
        )
    factor = 1.0 if math.isclose(f.scaling, adapter.scaling, rel_tol=1e-6) else f.scaling / adapter.scaling
    with torch.no_grad():
        A[: f.rank] = f.A.to(A)
        if not is_embedding(layer):  # whose A is drawn as zeros, so that B must not be
            B.zero_()
        B[:, : f.rank] = f.B.to(B) * factor


def _put_head(
    saved: SavedAdapter, heads: Mapping[str, Tensor], labels: Sequence[str], scoring: Collection[str]
) -> tuple[str, ...]:
    given = saved.state.dense
    if unknown := sorted(given.keys() - heads.keys()):
        raise AdapterError(
            f"adapter.start = '{saved.path}' holds a tensor '{unknown[0]}', which this run's adapter has not; it is of "
            "another task or model."
        )
    old, new = ([name.strip().casefold() for name in names] for names in (saved.labels or labels, labels))
    order = [old.index(name) for name in new] if sorted(old) == sorted(new) and len(set(new)) == len(new) else None
    notes = []
    if heads.keys() - given.keys():
        notes.append(f"adapter.start = '{saved.path}' holds no head, or a part of it; the rest begins as it is drawn")
    for name in heads.keys() & given.keys():
        tensor = given[name]
        if name in scoring:
            if order is None:
                continue
            tensor = tensor[order] if len(tensor) == len(order) else tensor
        if tensor.shape != heads[name].shape:
            raise AdapterError(
                f"adapter.start = '{saved.path}': tensor '{name}' is of shape {tuple(tensor.shape)}, and this run's of "
                f"{tuple(heads[name].shape)}; it is of other labels or another model."
            )
        heads[name].data.copy_(tensor)
    if saved.labels and order is None:
        notes.append(
            f"the head in adapter.start is for the labels {', '.join(saved.labels)[:200]}, others than the run's; its "
            "last layer begins as it is drawn"
        )
    elif order is not None and order != sorted(order):
        notes.append("the head in adapter.start has its labels in another order; its rows are put into the run's")
    return tuple(notes)
