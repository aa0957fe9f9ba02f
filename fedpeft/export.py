"""Adapters as PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedpeft.errors import AdapterError
from fedpeft.state import A_SUFFIX, B_SUFFIX, AdapterState, LoraFactors

ADAPTER_CONFIG, ADAPTER_TENSORS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
PEFT_PREFIX = "base_model.model."  # of all names in a PEFT model


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
    written = {**peft_config, **_ranks(state), "inference_mode": True}
    if isinstance(written.get("target_modules"), set | list | tuple):
        written["target_modules"] = sorted(written["target_modules"])  # a set's order is no order
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ADAPTER_CONFIG).write_text(
        json.dumps(written, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    tensors = {name: tensor.contiguous() for name, tensor in sorted(state.to_tensors().items())}
    save_file(tensors, directory / ADAPTER_TENSORS, metadata={"format": "pt"})


def write_labels(directory: Path, labels: Sequence[str]) -> None:
    """Write label names, in the order of their ids, beside an adapter."""
    (directory / LABELS).write_text(json.dumps(list(labels), ensure_ascii=False) + "\n", encoding="utf-8")


def _ranks(state: AdapterState) -> dict[str, Any]:
    """Return PEFT's one rank and one alpha, and its patterns for the layers that differ."""
    if not state.factors:  # an adapter of another kind, whose configuration says all
        return {}
    rank, scaling = Counter((f.rank, f.scaling) for f in state.factors.values()).most_common(1)[0][0]
    others = {
        layer.removeprefix(PEFT_PREFIX): f
        for layer, f in state.factors.items()
        if (f.rank, f.scaling) != (rank, scaling)
    }
    return {
        "r": rank,
        "lora_alpha": scaling * rank,
        "use_rslora": False,  # whose alpha / sqrt(r) is in the scaling already
        "rank_pattern": {layer: f.rank for layer, f in others.items()},
        "alpha_pattern": {layer: f.scaling * f.rank for layer, f in others.items()},
    }


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
        Factors with each layer's own scaling, and all other saved tensors, such as a head.
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
        No such adapter there, one that is pickled, or one of another kind.
    """
    config = _read_config(directory)
    _refuse_other_kinds(directory, config)
    file = directory / ADAPTER_TENSORS
    if not file.is_file():
        pickled = (directory / "adapter_model.bin").exists()
        only = "only adapter_model.bin, which can run code" if pickled else f"no {ADAPTER_TENSORS}"
        raise AdapterError(f"'{directory}' holds {only}; save the adapter with safe_serialization=True.")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot read '{file}': {error}") from None
    layers = sorted(name.removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX))
    for name, tensor in tensors.items():
        stem = name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX)
        if ".lora_" in name and (stem == name or stem + B_SUFFIX not in tensors or tensor.ndim != 2):
            raise AdapterError(
                f"'{directory}': tensor {name} of shape {tuple(tensor.shape)} is no factor of a linear layer; "
                "only LoRA on linear layers can be read."
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"'{directory}': tensor {name} holds NaN or infinity; leave this adapter out.")
    if not layers:
        raise AdapterError(f"'{directory}' holds no LoRA factors.")
    factors = {}
    for layer in layers:
        A, B = tensors.pop(layer + A_SUFFIX), tensors.pop(layer + B_SUFFIX)
        factors[layer] = LoraFactors(A, B, _scaling(config, layer.removeprefix(PEFT_PREFIX), A.shape[0]))
    return SavedAdapter(directory, config, AdapterState(factors, dict(sorted(tensors.items()))), _labels(directory))


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        inner = directory / "adapter" / ADAPTER_CONFIG
        hint = f"do you mean '{inner.parent}'?" if inner.is_file() else "give a folder that save_pretrained wrote."
        raise AdapterError(f"'{directory}' is no adapter: it holds no {ADAPTER_CONFIG}; {hint}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read '{directory / ADAPTER_CONFIG}': {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"'{directory / ADAPTER_CONFIG}' is no PEFT configuration.")
    return config


# initialisations that take something out of the base's weights, so that the factors alone are not the update
OF_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _refuse_other_kinds(directory: Path, config: Mapping[str, Any]) -> None:
    init = str(config.get("init_lora_weights", True)).lower()
    problems = {
        f"peft_type = '{config.get('peft_type')}'": config.get("peft_type") != "LORA",
        "use_dora = true": config.get("use_dora"),
        "lora_bias = true": config.get("lora_bias"),
        "layer_replication": config.get("layer_replication"),
        f"init_lora_weights = '{init}', which changes the base": init.startswith(OF_BASE),
    }
    if found := [problem for problem, is_there in problems.items() if is_there]:
        raise AdapterError(f"'{directory}' has {', '.join(found)}; only LoRA whose update is s B A can be read.")


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return alpha / r of a layer, as PEFT finds it; r is that of the tensors, which PEFT insists on."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), layer), config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _labels(directory: Path) -> list[str] | None:
    try:
        labels = json.loads((directory / LABELS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return labels if isinstance(labels, list) else None
