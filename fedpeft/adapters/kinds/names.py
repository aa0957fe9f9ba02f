"""Whose tensor a name is: derived from the kinds that there are, and from what PEFT calls the tensors of its tuners."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from fedpeft.adapters.kinds import KINDS
from fedpeft.errors import AdapterError

# what PEFT's classes do not say themselves: prompts, and a gate over adapters
PROMPTS = ("prompt_embeddings", "prompt_encoder", "prefix_task_", "internal_xlora_")
ROWS = "trainable_tokens_"  # single rows of the model's own embeddings, which are no adapter


def is_of_a_kind(name: str) -> bool:
    """Tell whether a tensor is some kind's and not of the model's head.

    Raises
    ------
    AdapterError
        It is a tensor of a tuner of PEFT that no kind claims: what may be done with it is not known.
    """
    if _of_kinds().search(name):
        return True
    if found := _of_tuners().search(name):
        raise AdapterError(
            f"tensor '{name}' is of an adapter ({found.group().lstrip('.')}), and of no adapter.kind that is known "
            f"here: {', '.join(KINDS.all())}. What may be averaged of it cannot be told."
        )
    return False


@cache
def _of_kinds() -> re.Pattern[str]:
    return _begins_a_part({part for kind in KINDS.all().values() for part in kind.parts})


@cache
def _of_tuners() -> re.Pattern[str]:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    marks = set(PROMPTS)
    for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values():
        layer = getattr(tuner, "tuner_layer_cls", None)
        marks |= {getattr(tuner, "prefix", ""), *getattr(layer, "adapter_layer_names", ())} - {""}
    return _begins_a_part(mark for mark in marks if not mark.startswith(ROWS))


def _begins_a_part(words: Iterable[str]) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, sorted(words)))})")


def forget() -> None:
    """Look at the registered kinds anew, after a package has been installed in mid-process."""
    _of_kinds.cache_clear()
