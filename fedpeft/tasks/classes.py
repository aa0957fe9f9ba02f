"""Which class of transformers a base is for a task, and what that can be given."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

from fedpeft import tasks
from fedpeft.bases import Inputs, describe_base, number_in, positions
from fedpeft.config import RunConfig
from fedpeft.data.tokens import length_of
from fedpeft.errors import ModelError
from fedpeft.tasks.task import Task


def model_class(config: RunConfig, described: Any) -> type | None:
    """Return the class that transformers has for the run's task; None where the folder brings its own.

    Parameters
    ----------
    config : RunConfig
        Names base and task.
    described : transformers.PretrainedConfig
        The base's configuration.

    Raises
    ------
    ModelError
        There is none, or it would be taken for what it is not.
    """
    task = tasks.of(config)
    is_a = f"'{config.model.name}' is a {described.model_type} model{_made_as(described)}"
    if task.continues and getattr(described, "is_encoder_decoder", False):
        raise ModelError(
            f"{is_a}, an encoder with a decoder: as a causal language model its decoder alone would be trained. "
            f"model.task = '{task.name}' takes models that are a decoder only, such as GPT-2, Llama or Qwen."
        )
    if task.auto in (getattr(described, "auto_map", None) or {}):
        return None
    classes = _classes(task)
    if type(described) not in classes:
        others = [
            other.name
            for other in tasks.TASKS.ours.values()
            if other is not task and type(described) in _classes(other) and _may_be(other, described)
        ]
        raise ModelError(
            f"{is_a}, and transformers has no model of that type for {task.name}. "
            + (f"It has some for {' and '.join(others)}: set model.task, or take" if others else "Take")
            + " another base."
        )
    if not _may_be(task, described):
        raise ModelError(
            f"{is_a}, which was made to fill in masks (is_decoder = false): it sees the tokens that a causal language "
            "model is to predict. Take one that was made to continue texts, such as GPT-2, Llama or Qwen."
        )
    kind = classes[type(described)]
    return kind[0] if isinstance(kind, list | tuple) else kind  # type: ignore[no-any-return]


def _classes(task: Task) -> Any:
    """Return transformers' mapping of configurations to classes for a task."""
    import transformers

    return getattr(transformers, task.auto)._model_mapping


def _may_be(task: Task, described: Any) -> bool:
    """Tell whether a model does not see the tokens that the task predicts, and is whole in it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if not task.continues:
        return True
    continues = getattr(described, "is_decoder", False) or getattr(described, "causal", False)
    fills_masks = type(described) in MODEL_FOR_MASKED_LM_MAPPING and not continues
    return not (fills_masks or getattr(described, "is_encoder_decoder", False))


def _made_as(described: Any) -> str:
    names = getattr(described, "architectures", None)
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
    described = describe_base(config, folder)
    kind = model_class(config, described)
    text, vision = described.get_text_config(), getattr(described, "vision_config", described)
    takes_types = kind is None or "token_type_ids" in inspect.signature(cast(Any, kind).forward).parameters
    return Inputs(
        tokens=positions(text, kind),
        vocabulary=number_in(text, "vocab_size"),
        types=number_in(text, "type_vocab_size") if takes_types else 0,
        channels=number_in(described, "num_channels") or number_in(vision, "num_channels") or 3,
        end=number_in(text, "eos_token_id") if getattr(described, "is_encoder_decoder", False) else None,
    )


def max_length(config: RunConfig, folder: Path) -> int:
    """Return how many tokens are kept of each row; see `fedpeft.data.tokens.length_of`."""
    return length_of(config, inputs_of(config, folder), continues=tasks.of(config).continues)
