"""Texts to classify as tokens, and the tokenizer that makes these and all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.bases import Inputs, first_line
from fedpeft.config import RunConfig
from fedpeft.data.chat.rendering import Renderer
from fedpeft.data.chat.templates import chosen
from fedpeft.data.readers import Place, plain_batches
from fedpeft.data.splits import Encoding
from fedpeft.errors import DataError, ModelError

BATCH_ROWS = 1000

Tokens = dict[str, list[list[int]]]


def encode_texts(config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset) -> Encoding:
    """Tokenise the texts, or pairs of texts, of a place.

    Parameters
    ----------
    config : RunConfig
        Names the length.
    model_dir : Path
        Folder of the tokenizer.
    inputs : Inputs
        What the model can be given.
    place : Place
        Where the rows lie, for messages.
    rows : datasets.Dataset
        Normalised rows.

    Returns
    -------
    Encoding
        Of which the tensors are ``tokens``, ``offsets``, ``cut`` and perhaps ``types``.

    Raises
    ------
    DataError
        The length fits neither model nor tokenizer, or a row becomes no tokens.
    ModelError
        There is no tokenizer, or one without a token that can pad, or what it makes is not what the model can be given.
    """
    tokenizer, pad_token_id = load_tokenizer(config, model_dir)
    max_length = length_of(config, inputs, continues=False)
    added = tokenizer.num_special_tokens_to_add(pair=config.data.text_pair is not None)
    if max_length <= added:
        raise DataError(f"data.max_length = {max_length}, but the tokenizer alone adds {added} tokens. Set it to more.")
    tokens: list[NDArray[np.int32]] = []
    types: list[NDArray[np.uint8]] = []
    cut: list[int] = []
    ends = None if inputs.end is None else _ends(tokenizer, inputs.end, rows, max_length)
    for batch in plain_batches(rows, BATCH_ROWS):
        encoded = tokenise(tokenizer, batch, max_length)
        ids = encoded["input_ids"]
        _check_rows(place, batch["row"], ids, tokenizer, ends)
        cut += _lost(tokenizer, batch, ids, max_length)
        tokens += [np.array(whole, dtype=np.int32) for whole in ids]
        types += [np.array(kinds, dtype=np.uint8) for kinds in encoded.get("token_type_ids", ())]
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    tensors = {
        "tokens": torch.from_numpy(np.concatenate(tokens)),
        "offsets": torch.from_numpy(offsets),
        "cut": torch.tensor(cut, dtype=torch.int32),
    }
    check_vocabulary(model_dir, inputs, tokenizer, max(pad_token_id, int(tensors["tokens"].max())))
    if types and inputs.types != 0:  # else the model reads none, whatever they are
        tensors["types"] = torch.from_numpy(np.concatenate(types))
        _check_types(model_dir, inputs, int(tensors["types"].max()))
    return Encoding(tensors, pad_token_id)


def _lost(tokenizer: Any, batch: Mapping[str, list[Any]], ids: list[list[int]], max_length: int) -> list[int]:
    """Return how many tokens each row lost; only those of full length can have lost any."""
    cut = [0] * len(ids)
    if full := [at for at, whole in enumerate(ids) if len(whole) == max_length]:
        some = {name: [batch[name][at] for at in full] for name in ("text", "text_pair") if name in batch}
        for at, whole in zip(full, tokenise(tokenizer, some, None)["input_ids"], strict=True):
            cut[at] = len(whole) - max_length
    return cut


def _check_rows(
    place: Place, rows: Sequence[int], ids: list[list[int]], tokenizer: Any, ends: tuple[int, int] | None
) -> None:
    """Raise DataError for a row of which no tokens are left, or that has not so many of the end token."""
    for row, whole in zip(rows, ids, strict=True):
        if not whole:
            raise DataError(f"{place.row(row)} becomes no tokens. Remove it, or write it in other characters.")
        if ends is not None and whole.count(ends[0]) != ends[1]:
            raise DataError(
                f"{place.row(row)} holds an end token ({tokenizer.convert_ids_to_tokens(ends[0])!r}) in its "
                "own text, and the model takes its scores from the last one of each row. Remove it from the text."
            )


def load_tokenizer(config: RunConfig, model_dir: Path) -> tuple[Any, int]:
    """Load the tokenizer and say what pads: its padding token, else its end token, which the attention mask hides.

    Its chat template is the effective one: that of `data.template` where it is set.

    Raises
    ------
    ModelError
        There is no tokenizer, or it has neither.
    ConfigError
        `data.template` names no template.
    """
    import transformers
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=config.model.trust_remote_code
        )
    except Exception as error:  # files of another tokenizer make its code raise whatever it likes
        raise ModelError(
            f"'{model_dir}' has no tokenizer that can be loaded ({first_line(error)}). Save one there with "
            "save_pretrained."
        ) from error
    tokenizer.model_max_length = int(VERY_LARGE_INTEGER)  # data.max_length alone counts
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ModelError(f"the tokenizer in '{model_dir}' has neither a padding nor an end token. Set its pad_token.")
    if (template := chosen(config.data)) is not None:
        tokenizer.chat_template = template.text
    return tokenizer, int(pad)


def end_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: the tokenizer's end token, and what the chat template ends turns with.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of which the chat template is the effective one, as `load_tokenizer` returns it.
    """
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    stops = () if tokenizer.chat_template is None else Renderer(tokenizer).stops
    return tuple(dict.fromkeys([*own, *stops]))


SHORT, LONG = 128, 1024  # tokens of a row where data.max_length is not set: of texts to classify, and to continue


def length_of(config: RunConfig, inputs: Inputs, *, continues: bool) -> int:
    """Return how many tokens are kept of each row.

    Parameters
    ----------
    config : RunConfig
        Whose `data.max_length` counts where it is set.
    inputs : Inputs
        What the model can be given.
    continues : bool
        Whether it is a language model, whose rows are conversations.

    Raises
    ------
    DataError
        The model cannot read as many.
    """
    limit, given = inputs.tokens, config.data.max_length
    if given is None:
        given = min(LONG, limit or LONG) if continues else SHORT
    if limit is not None and given > limit:
        raise DataError(f"data.max_length = {given}, but the model reads {limit} tokens. Set it to {limit} or less.")
    return given


def _ends(tokenizer: Any, end: int, rows: datasets.Dataset, max_length: int) -> tuple[int, int] | None:
    """Return the end token and how many of it the tokenizer adds to a row of its own accord; None if it adds none."""
    empty = {name: [""] for name in rows.column_names if name in ("text", "text_pair")}
    count = tokenise(tokenizer, empty, max_length)["input_ids"][0].count(end)
    return (end, count) if count else None


def check_vocabulary(model_dir: Path, inputs: Inputs, tokenizer: Any, largest: int) -> None:
    """Raise ModelError for a token that the model has no embedding of, such as one added after it was made."""
    if inputs.vocabulary is not None and largest >= inputs.vocabulary:
        raise ModelError(
            f"the tokenizer in '{model_dir}' makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but "
            f"the model has {inputs.vocabulary} embeddings, 0 to {inputs.vocabulary - 1}. Save the tokenizer that "
            f"belongs to it, or the model after resize_token_embeddings({len(tokenizer)})."
        )


def _check_types(model_dir: Path, inputs: Inputs, largest: int) -> None:
    if inputs.types is not None and largest >= inputs.types:
        raise ModelError(
            f"the tokenizer in '{model_dir}' makes token type {largest}, but the model has {inputs.types} "
            f"(type_vocab_size), 0 to {inputs.types - 1}. Save the tokenizer that belongs to it, or one whose "
            "model_input_names lack token_type_ids."
        )


def tokenise(tokenizer: Any, batch: Mapping[str, list[Any]], max_length: int | None) -> Tokens:
    """Tokenise a few texts to classify.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The base model's.
    batch : mapping of str to list
        Columns ``text`` and perhaps ``text_pair``.
    max_length : int or None
        Tokens kept of each row, all if None. Texts are cut at their end, of a pair the longer one first.

    Returns
    -------
    dict of str to list of list of int
        ``input_ids``, and ``token_type_ids`` where the tokenizer makes them.
    """
    tokenizer.truncation_side = "right"
    encoded = tokenizer(
        batch["text"],
        batch.get("text_pair"),
        truncation=False if max_length is None else "longest_first",
        max_length=max_length,
        return_attention_mask=False,
    )
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
