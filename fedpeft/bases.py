"""What a base's files say before any weight is read: what it may be used for, and what it can be given."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.errors import ModelError


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


def describe_base(config: RunConfig, folder: Path, **settings: Any) -> Any:
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


def positions(text: Any, kind: type | None) -> int | None:
    """Return how many tokens the positions of a model last for."""
    told = number_in(text, "max_position_embeddings") or number_in(text, "max_seq_len")  # as MPT calls it
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
    return 1 if text.model_type == "mpnet" else number_in(text, "pad_token_id")  # MPNet's is written into its code


def padding_of_positions(model: Any) -> int | None:
    """Return the id that a model counts its positions from; None where it does not count them so."""
    if not counts_from_padding(type(model)):
        return None
    return _padding(model.config.get_text_config(), type(model))


def number_in(held: Any, name: str) -> int | None:
    """Return a whole number of a configuration; None where it says none."""
    value = getattr(held, name, None)
    return value if isinstance(value, int) else None
