"""What each field of PEFT's LoRA configuration means for an adapter on disk: whether its update is s B A, and no more.

PEFT gains fields with every release. One that is not listed here is refused where it is set, since an adapter that is
taken for what it is not merges without a word into something wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Meaning(StrEnum):
    """What a field does to an adapter on disk."""

    FACTORS = "said by the factors: ranks and scalings"
    LAYERS = "says which layers have factors, and so do the tensors' names"
    IDLE = "of training or of loading; nothing of what the adapter does depends on it"
    START = "of the first draw and of training; left out of what is written, or PEFT would do it again"
    SAME = "must be the same for adapters of one model"
    AGREE = "must be the same where it is set"
    REFUSED = "makes the update something else than s B A of one matrix"


LORA_FIELDS: dict[str, Meaning] = {
    "r": Meaning.FACTORS,
    "lora_alpha": Meaning.FACTORS,
    "use_rslora": Meaning.FACTORS,
    "rank_pattern": Meaning.FACTORS,
    "alpha_pattern": Meaning.FACTORS,
    "target_modules": Meaning.LAYERS,
    "exclude_modules": Meaning.LAYERS,
    "layers_to_transform": Meaning.LAYERS,
    "layers_pattern": Meaning.LAYERS,
    "auto_mapping": Meaning.IDLE,
    "peft_version": Meaning.IDLE,
    "inference_mode": Meaning.IDLE,
    "lora_dropout": Meaning.IDLE,
    "megatron_core": Meaning.IDLE,  # the name of a package, for megatron_config
    "qalora_group_size": Meaning.IDLE,  # for use_qalora
    "runtime_config": Meaning.IDLE,
    "init_lora_weights": Meaning.START,  # but see `changes_base`
    "loftq_config": Meaning.START,
    "eva_config": Meaning.START,
    "corda_config": Meaning.START,
    "lora_ga_config": Meaning.START,
    "velora_config": Meaning.START,  # which saves memory in the backward pass
    "peft_type": Meaning.SAME,
    "fan_in_fan_out": Meaning.SAME,
    "bias": Meaning.SAME,
    "modules_to_save": Meaning.SAME,
    "trainable_token_indices": Meaning.SAME,  # in order: the saved rows are those of these tokens
    "target_parameters": Meaning.SAME,
    "ensure_weight_tying": Meaning.SAME,
    "base_model_name_or_path": Meaning.AGREE,
    "revision": Meaning.AGREE,
    "task_type": Meaning.AGREE,
    "use_dora": Meaning.REFUSED,
    "lora_bias": Meaning.REFUSED,
    "layer_replication": Meaning.REFUSED,
    "megatron_config": Meaning.REFUSED,
    "alora_invocation_tokens": Meaning.REFUSED,
    "use_qalora": Meaning.REFUSED,
    "monteclora_config": Meaning.REFUSED,
    "use_bdlora": Meaning.REFUSED,
    "arrow_config": Meaning.REFUSED,
    "kasa_config": Meaning.REFUSED,
}
NAMES = ("modules_to_save", "target_parameters")  # lists of names, on which the reading of tensors depends
# what PEFT takes where a field is not said, if that is not nothing
DEFAULTS: dict[str, Any] = {"bias": "none"}

# initialisations that leave the base as it is
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
# those that take something out of its weights, so that the factors alone are not the update
OF_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
OFFERS_CONVERSION = ("pissa", "olora", "corda", "lora_ga")


def problems_of(config: Mapping[str, Any]) -> list[str]:
    """Return what in a configuration makes an adapter something else than s B A, in words; mostly nothing."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"peft_type = '{kind}'"]
    found = [
        f"{name} = {_shown(value)}"
        for name, value in config.items()
        if LORA_FIELDS.get(name) is Meaning.REFUSED and canonical(name, value) is not None
    ]
    found += [
        f"{name} = {_shown(value)}, which is no field of LoRA that is known here"
        for name, value in config.items()
        if name not in LORA_FIELDS and canonical(name, value) is not None
    ]
    found += [
        f"{name} = {_shown(config[name])}, which is no list of names (write [] in its place if it means none)"
        for name in NAMES
        if not isinstance(config.get(name) or [], list)
    ]
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(OF_BASE):
        way = " (PEFT undoes that by save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        offered = way if init.startswith(OFFERS_CONVERSION) else ""
        found.append(f"init_lora_weights = '{init}', which changes the base{offered}")
    elif init not in PLAIN_INITS:
        found.append(f"init_lora_weights = '{init}', which is not known here")
    return found


def written_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what says how an adapter began."""
    return {name: value for name, value in config.items() if LORA_FIELDS.get(name) is not Meaning.START}


def canonical(name: str, value: Any) -> Any:
    """Return a field's value such that equal ones mean the same; None for what is not set."""
    if value is None or value == DEFAULTS.get(name) or value is False or value in ([], {}, ""):
        return None
    if isinstance(value, list | tuple) and name != "trainable_token_indices":
        return sorted(map(str, value))
    return value


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
