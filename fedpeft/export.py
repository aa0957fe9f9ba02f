"""Adapters as files that PEFT loads: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fedpeft.state import AdapterState

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
    (directory / ADAPTER_CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True, default=str) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in sorted(state.to_tensors().items())}
    save_file(tensors, directory / ADAPTER_TENSORS, metadata={"format": "pt"})


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
