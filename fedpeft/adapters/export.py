"""Adapters as PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpeft.adapters import embeddings, experts
from fedpeft.adapters.lora_fields import problems_of
from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX, AdapterState, LoraFactors
from fedpeft.errors import AdapterError
from fedpeft.jsons import to_json

ADAPTER_CONFIG, ADAPTER_TENSORS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
PEFT_PREFIX = "base_model.model."  # of all names in a PEFT model
TOKEN_ROWS = ".trainable_tokens_delta"  # suffix of the rows of single tokens
TRAINING_AID = ".lora_velora_"  # buffers that only VeLoRA's backward pass reads
# what PEFT saves without a word in the configuration: heads of its tasks, and embeddings that have been resized
UNSAID = ("classifier", "score", "qa_outputs", "embed_tokens", "lm_head")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def write_adapter(directory: Path, peft_config: Mapping[str, Any], state: AdapterState) -> None:
    """Write an adapter that ``PeftModel.from_pretrained`` loads.

    Parameters
    ----------
    directory : Path
        Made if it does not exist.
    peft_config : mapping
        PEFT's configuration; ranks and alphas are replaced by those of `state`.
    state : AdapterState
        Every tensor of the adapter, the head included; layers may differ in rank and scaling.
    """
    factors = experts.level(state.factors)
    written = {**peft_config, **_ranks(factors, peft_config), "inference_mode": True}
    text = to_json(written, indent=2, sort_keys=True) + "\n"
    whole = AdapterState(experts.join(factors), state.dense)
    tensors = {embeddings.saved_name(name): tensor.contiguous() for name, tensor in sorted(whole.to_tensors().items())}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    save_file(tensors, directory / ADAPTER_TENSORS, metadata={"format": "pt"})


def write_labels(directory: Path, labels: Sequence[str]) -> None:
    """Write label names, in the order of their ids, beside an adapter."""
    (directory / LABELS).write_text(to_json(list(labels), ensure_ascii=False) + "\n", encoding="utf-8")


def _ranks(factors: Mapping[str, LoraFactors], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's one rank and one alpha, and its patterns for the layers that differ."""
    if not factors:  # an adapter of another kind, whose configuration says all
        return {}
    rank, scaling = Counter((f.rank, f.scaling) for f in factors.values()).most_common(1)[0][0]
    names = {layer: experts.pattern_names(layer.removeprefix(PEFT_PREFIX), config) for layer in factors}
    every = {name for each in names.values() for name in each}
    others = {
        _pattern(name, every): f
        for layer, f in factors.items()
        if (f.rank, f.scaling) != (rank, scaling)
        for name in names[layer]
    }
    return {
        "r": rank,
        "lora_alpha": scaling * rank,
        "use_rslora": False,  # whose alpha / sqrt(r) is in the scaling already
        "rank_pattern": {name: f.rank for name, f in others.items()},
        "alpha_pattern": {name: f.scaling * f.rank for name, f in others.items()},
    }


def _pattern(name: str, every: Iterable[str]) -> str:
    """Return a layer's key among PEFT's patterns, which are expressions that match the end of a name."""
    if any(other != name and re.match(rf"(.*\.)?({name})$", other) for other in every):
        return "^" + re.escape(name)
    return name


@dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter as it lies in a folder.

    Parameters
    ----------
    path : Path
        The folder.
    config : mapping
        PEFT's configuration.
    state : AdapterState
        Factors with each layer's own scaling, those of a stack of experts one by one, those of an embedding as of a
        linear layer; and all other saved tensors, such as a head.
    labels : list of str or None
        From labels.json, which fedpeft writes.
    """

    path: Path
    config: Mapping[str, Any]
    state: AdapterState
    labels: list[str] | None


def read_adapter(directory: Path) -> SavedAdapter:
    """Read a LoRA adapter whose update is ``scaling * B @ A`` of an unchanged base, and no more.

    Raises
    ------
    AdapterError
        No such adapter there, one that is pickled, one of another kind, or tensors that its configuration does not
        explain.
    """
    config = _read_config(directory)
    if problems := problems_of(config):
        raise AdapterError(f"'{directory}' has {'; '.join(problems)}: only LoRA whose update is s B A can be read.")
    tensors = _read_tensors(directory)
    for name, tensor in tensors.items():
        _check_tensor(directory, config, tensors, name, tensor)
    layers = sorted(name.removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX))
    if not layers:
        raise AdapterError(f"'{directory}' holds no LoRA factors.")
    factors: dict[str, LoraFactors] = {}
    for layer in layers:
        A, B = tensors.pop(layer + A_SUFFIX), tensors.pop(layer + B_SUFFIX)
        factors |= _factors(directory, config, layer, A, B)
    return SavedAdapter(directory, config, AdapterState(factors, dict(sorted(tensors.items()))), _labels(directory))


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        inner = directory / "adapter" / ADAPTER_CONFIG
        hint = f"do you mean '{inner.parent}'?" if inner.is_file() else "give a folder that save_pretrained wrote."
        raise AdapterError(f"'{directory}' is no adapter: it holds no {ADAPTER_CONFIG}; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read '{directory / ADAPTER_CONFIG}': {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"'{directory / ADAPTER_CONFIG}' is no PEFT configuration.")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    file = directory / ADAPTER_TENSORS
    if not file.is_file():
        pickled = (directory / "adapter_model.bin").exists()
        only = "only adapter_model.bin, which can run code" if pickled else f"no {ADAPTER_TENSORS}"
        raise AdapterError(f"'{directory}' holds {only}; save the adapter with safe_serialization=True.")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot read '{file}': {error}") from None
    return {embeddings.named(name): tensor for name, tensor in tensors.items() if TRAINING_AID not in name}


def _check_tensor(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, tensor: Tensor
) -> None:
    """Raise AdapterError for a tensor that is no factor of a linear layer, and that no field of `config` explains."""
    shown = f"'{directory}': tensor {embeddings.saved_name(name)} of shape {tuple(tensor.shape)}"
    if ".lora_" in name:
        stem = name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX)
        if stem == name or stem + A_SUFFIX not in tensors or stem + B_SUFFIX not in tensors or tensor.ndim != 2:
            raise AdapterError(
                f"{shown} is no factor of a linear layer or an embedding, or the other one is not there; only LoRA on "
                "these can be read, not on convolutions, and without magnitudes and biases of its own."
            )
    elif not _explained(name, config):
        raise AdapterError(
            f"{shown} is explained by nothing in {ADAPTER_CONFIG}, such as modules_to_save; what it means is not known."
        )
    if tensor.dtype not in FLOATS:
        raise AdapterError(f"{shown} is of type {tensor.dtype}, which has no mean; leave this adapter out.")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{shown} holds NaN or infinity; leave this adapter out.")


def _explained(name: str, config: Mapping[str, Any]) -> bool:
    if name.endswith(TOKEN_ROWS):
        return bool(config.get("trainable_token_indices"))
    if name.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    parts = name.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]  # all that the tensor is inside of
    kept = config.get("modules_to_save") or ()
    return any(module.endswith(tuple(map(str, kept))) or module.split(".")[-1] in UNSAID for module in modules)


def _factors(directory: Path, config: Mapping[str, Any], layer: str, A: Tensor, B: Tensor) -> dict[str, LoraFactors]:
    """Return a layer's factors: one pair, or one for each expert."""
    if A.shape[0] != B.shape[1]:
        raise AdapterError(f"'{directory}': A and B of layer {layer} have ranks {A.shape[0]} and {B.shape[1]}.")
    names = experts.pattern_names(layer.removeprefix(PEFT_PREFIX), config)
    try:
        found = {(_entry(config, "rank_pattern", "r", name), _scaling(config, name)) for name in names}
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
        raise AdapterError(f"'{directory / ADAPTER_CONFIG}': ranks or alphas cannot be read: {error}.") from None
    if len(found) > 1:
        raise AdapterError(f"'{directory}': parameters of '{layer}' differ in rank or alpha, which cannot be read.")
    ((rank, scaling),) = found
    if not math.isfinite(scaling) or scaling == 0:
        raise AdapterError(
            f"'{directory}': layer {layer} is scaled by {scaling:g}, lora_alpha over rank in {ADAPTER_CONFIG}; it must "
            "be a number other than 0."
        )
    if experts.is_stack(layer.removeprefix(PEFT_PREFIX), config) and rank > 0 and A.shape[0] % rank == 0:
        return experts.split(layer, A, B, int(rank), scaling)
    if rank != A.shape[0]:
        if bare := [name for name in map(str, config.get("target_parameters") or ()) if "." not in name]:
            raise AdapterError(
                f"'{directory}': layer {layer} has rank {A.shape[0]}, where {ADAPTER_CONFIG} says {rank:g}; whose "
                f"parameters target_parameters = {', '.join(sorted(bare))} are cannot be told. Train it with names "
                f"such as mlp.experts.{min(bare)}."
            )
        raise AdapterError(
            f"'{directory}': layer {layer} has rank {A.shape[0]}, where {ADAPTER_CONFIG} says {rank:g}; PEFT would not "
            "load it either."
        )
    return {layer: LoraFactors(A, B, scaling)}


def _entry(config: Mapping[str, Any], patterns: str, otherwise: str, name: str) -> float:
    """Return what PEFT finds for a layer: the first pattern that matches, or the one value of all others."""
    from peft.utils.other import get_pattern_key

    listed = config.get(patterns) or {}
    return float(listed.get(get_pattern_key(listed.keys(), name), config.get(otherwise, 8)))


def _scaling(config: Mapping[str, Any], name: str) -> float:
    """Return alpha / r of a layer, as PEFT finds it."""
    rank = _entry(config, "rank_pattern", "r", name)
    return _entry(config, "alpha_pattern", "lora_alpha", name) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _labels(directory: Path) -> list[str] | None:
    try:
        labels = json.loads((directory / LABELS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read '{directory / LABELS}': {error}") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AdapterError(f"'{directory / LABELS}' is no list of names; mend it, or remove it.")
    return labels
