"""What a base's files say before any weight is read: what it may be used for, and what it can be given."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedpeft.config import RunConfig, Task
from fedpeft.errors import ModelError

AUTO_CLASSES: dict[Task, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
}


@dataclass(frozen=True)
class Inputs:
    """What a base can be given.

    Parameters
    ----------
    tokens : int or None
        Most tokens of a row; None where there is no such number.
    vocabulary : int or None
        Rows of the table of embeddings: token ids are below it.
    types : int or None
        Kinds of token types; 0 where the model takes none, None where it does not say how many.
    channels : int
        Of its images.
    end : int or None
        Id of the token that a classifier reads its scores at, where every row must hold as many as any other.
    """

    tokens: int | None
    vocabulary: int | None
    types: int | None
    channels: int
    end: int | None = None


def check_folder(folder: Path) -> None:
    """Raise ModelError for a folder of an adapter, with or without a base beside it."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        return
    try:
        inner = json.loads(adapter.read_text(encoding="utf-8"))
        kind, base = (inner.get(key) for key in ("peft_type", "base_model_name_or_path"))
    except (OSError, ValueError, AttributeError):
        kind = base = None
    what = f"an adapter of PEFT ({kind or 'of no known kind'})"
    if (folder / "config.json").is_file():
        raise ModelError(
            f"'{folder}' holds {what} beside the model, {adapter.name}, and a run puts its own adapter into a base "
            "without one. Merge it into the weights (merge_and_unload, save_pretrained), or move its files away."
        )
    raise ModelError(
        f"'{folder}' is {what}, not a model. Give its base{f', {base!r},' if base else ''} as model.name, or merge it "
        "into that (merge_and_unload, save_pretrained) and give the result."
    )


def read_config(config: RunConfig, folder: Path, **settings: Any) -> Any:
    """Return transformers' configuration of a base.

    Parameters
    ----------
    config : RunConfig
        Says whether code of the folder may run.
    folder : Path
        The base's.
    **settings
        What counts in place of the folder's own values.

    Raises
    ------
    ModelError
        There is none that can be read.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=config.model.trust_remote_code, **settings
        )
    except Exception as error:  # a configuration runs its own checks, which raise whatever they like
        raise ModelError(f"cannot read '{folder / 'config.json'}': {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, else the name of its class."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    said = next((line for line in lines if line), "")
    # what only introduces the lines after it
    said = f"{said} {lines[lines.index(said) + 1]}" if said.endswith(":") and said != lines[-1] else said
    return said[:300] or type(error).__name__


def model_class(config: RunConfig, held: Any) -> type | None:
    """Return the class that transformers has for the run's task; None where the folder brings its own.

    Raises
    ------
    ModelError
        There is none, or it would be taken for what it is not.
    """
    from transformers.models.auto import modeling_auto as auto

    task = config.task
    mappings: dict[Task, Any] = {
        "sequence-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    name = f"'{config.model.name}'"
    is_a = f"{name} is a {held.model_type} model{_made_as(held)}"
    if task == "causal-lm" and getattr(held, "is_encoder_decoder", False):
        raise ModelError(
            f"{is_a}, an encoder with a decoder: as a causal language model its decoder alone would be trained. "
            "model.task = 'causal-lm' takes models that are a decoder only, such as GPT-2, Llama or Qwen."
        )
    if AUTO_CLASSES[task] in (getattr(held, "auto_map", None) or {}):
        return None
    if type(held) not in mappings[task]:
        others = [other for other, mapping in mappings.items() if type(held) in mapping and _may_be(other, held)]
        raise ModelError(
            f"{is_a}, and transformers has no model of that type for {task}. "
            + (f"It has some for {' and '.join(others)}: set model.task, or take" if others else "Take")
            + " another base."
        )
    if not _may_be(task, held):
        raise ModelError(
            f"{is_a}, which was made to fill in masks (is_decoder = false): it sees the tokens that a causal language "
            "model is to predict. Take one that was made to continue texts, such as GPT-2, Llama or Qwen."
        )
    found = mappings[task][type(held)]
    return found[0] if isinstance(found, list | tuple) else found  # type: ignore[no-any-return]


def _may_be(task: Task, held: Any) -> bool:
    """Tell whether a model does not see the tokens that the task predicts, and is whole in it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if task != "causal-lm":
        return True
    continues = getattr(held, "is_decoder", False) or getattr(held, "causal", False)
    fills_masks = type(held) in MODEL_FOR_MASKED_LM_MAPPING and not continues
    return not (fills_masks or getattr(held, "is_encoder_decoder", False))


def _made_as(held: Any) -> str:
    names = getattr(held, "architectures", None)
    return f" ({', '.join(names)})" if names else ""


def inputs_of(config: RunConfig, folder: Path) -> Inputs:
    """Return what a base can be given.

    Raises
    ------
    ModelError
        It is no model for the run's task.
    """
    if not (folder / "config.json").is_file():  # a tokenizer or processor alone, which encodes as well
        return Inputs(None, None, None, 3)
    held = read_config(config, folder)
    kind = model_class(config, held)
    text, vision = held.get_text_config(), getattr(held, "vision_config", held)
    takes_types = kind is None or "token_type_ids" in inspect.signature(cast(Any, kind).forward).parameters
    return Inputs(
        tokens=_positions(text, kind),
        vocabulary=_number(text, "vocab_size"),
        types=_number(text, "type_vocab_size") if takes_types else 0,
        channels=_number(held, "num_channels") or _number(vision, "num_channels") or 3,
        end=_number(text, "eos_token_id") if getattr(held, "is_encoder_decoder", False) else None,
    )


def _positions(text: Any, kind: type | None) -> int | None:
    """Return how many tokens the positions of a model last for."""
    told = _number(text, "max_position_embeddings") or _number(text, "max_seq_len")  # as MPT calls it
    if not told or told < 0:  # XLNet says -1
        return None
    if getattr(text, "position_biased_input", True) is False:
        return None  # DeBERTa that looks at distances alone
    if kind is not None and counts_from_padding(kind) and (pad := _padding(text, kind)) is not None:
        return told - pad - 1
    return told


def counts_from_padding(kind: type) -> bool:
    """Tell whether a class of models counts positions from the padding token's id plus one, as RoBERTa does."""
    name = "create_position_ids_from_input_ids"
    module = sys.modules[kind.__module__]
    return hasattr(module, name) or any(hasattr(held, name) for held in vars(module).values() if isinstance(held, type))


def _padding(text: Any, kind: type) -> int | None:
    return 1 if text.model_type == "mpnet" else _number(text, "pad_token_id")  # MPNet's is written into its code


def padding_of_positions(model: Any) -> int | None:
    """Return the id that a model counts its positions from; None where it does not count them so."""
    if not counts_from_padding(type(model)):
        return None
    return _padding(model.config.get_text_config(), type(model))


def _number(held: Any, name: str) -> int | None:
    value = getattr(held, name, None)
    return value if isinstance(value, int) else None
