"""Texts as tokens: what is tokenised together, where rows are cut, which tokens the loss counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.bases import Inputs, first_line
from fedpeft.config import RunConfig, Truncate
from fedpeft.data.readers import Place, plain_batches
from fedpeft.data.splits import Encoding
from fedpeft.errors import DataError, ModelError

BATCH_ROWS = 1000

Tokens = dict[str, list[list[int]]]
Cuts = dict[str, int]  # rows that were cut, by what they lost


def encode_texts(config: RunConfig, model_dir: Path, inputs: Inputs, place: Place, rows: datasets.Dataset) -> Encoding:
    """Tokenise all rows of a place: prompts and completions where they have such, else texts.

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
        Of which the tensors are ``tokens``, ``offsets`` and perhaps ``types`` and ``prompts``.

    Raises
    ------
    DataError
        The length fits neither model nor tokenizer, or a row becomes no tokens that count.
    ModelError
        There is no tokenizer, or one without a token that can pad, or its chat template refuses plain turns, or what it
        makes is not what the model can be given.
    """
    tokenizer, pad_token_id = load_tokenizer(config, model_dir)
    max_length = _checked_length(config, inputs, tokenizer, completes="conversation" in rows.column_names)
    tokens: list[NDArray[np.int32]] = []
    types: list[NDArray[np.uint8]] = []
    prompts: list[int] = []
    ends = None if inputs.end is None else _ends(tokenizer, inputs.end, rows, max_length)
    cuts: Cuts = {"prompt": 0, "whole prompt": 0, "completion": 0}
    for batch in plain_batches(rows, BATCH_ROWS):
        encoded = tokenise(tokenizer, batch, max_length, config.data.truncate or "longest")
        ids = encoded["input_ids"]
        heads = [length for (length,) in encoded.get("prompt_lengths", [[0]] * len(ids))]
        # nothing comes before a first token that could tell it
        least = [max(head, 1) if "prompt_lengths" in encoded else 0 for head in heads]
        _check_rows(place, batch["row"], ids, least, tokenizer, ends)
        for (prompt, completion), head in zip(encoded.get("lost", ()), heads, strict=False):
            cuts["prompt"] += prompt > 0 and head > 0
            cuts["whole prompt"] += prompt > 0 and head == 0
            cuts["completion"] += completion > 0
        tokens += [np.array(whole, dtype=np.int32) for whole in ids]
        types += [np.array(kinds, dtype=np.uint8) for kinds in encoded.get("token_type_ids", ())]
        if "prompt_lengths" in encoded:
            prompts += heads
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    tensors = {"tokens": torch.from_numpy(np.concatenate(tokens)), "offsets": torch.from_numpy(offsets)}
    _check_vocabulary(model_dir, inputs, tokenizer, max(pad_token_id, int(tensors["tokens"].max())))
    if types and inputs.types != 0:  # else the model reads none, whatever they are
        tensors["types"] = torch.from_numpy(np.concatenate(types))
        _check_types(model_dir, inputs, int(tensors["types"].max()))
    if prompts:
        tensors["prompts"] = torch.tensor(prompts, dtype=torch.int32)
    return Encoding(tensors, pad_token_id, cuts)


def _check_rows(
    place: Place,
    rows: Sequence[int],
    ids: list[list[int]],
    least: Sequence[int],
    tokenizer: Any,
    ends: tuple[int, int] | None,
) -> None:
    """Raise DataError for a row of which `least` tokens or fewer are left, or that has not so many of the end token."""
    for row, whole, few in zip(rows, ids, least, strict=True):
        if len(whole) <= few:
            raise DataError(
                f"row {row} of {place} becomes no tokens{' that the loss could count' if len(whole) else ''}. "
                "Remove it, or write it in other characters."
            )
        if ends is not None and whole.count(ends[0]) != ends[1]:
            raise DataError(
                f"row {row} of {place} holds an end token ({tokenizer.convert_ids_to_tokens(ends[0])!r}) in its "
                "own text, and the model takes its scores from the last one of each row. Remove it from the text."
            )


def cut_notes(config: RunConfig, place: Place, count: int, cuts: Cuts) -> tuple[str, ...]:
    """Say in one line how many of a place's rows were cut, and what changes that; nothing where none was."""
    whole, part, ends = cuts["whole prompt"], cuts["prompt"], cuts["completion"]
    lost = [
        *([f"{whole:,} lose the whole prompt"] if whole else []),
        *([f"{part:,} lose the beginning of the prompt"] if part else []),
        *([f"{ends:,} lose the end of the completion"] if ends else []),
    ]
    if not lost:
        return ()
    data = config.data
    others = [repr(name) for name in get_args(Truncate) if name != (data.truncate or "longest")]
    return (
        f"of {count:,} rows of {place} {', '.join(lost)}, cut to data.max_length = {data.max_length} with "
        f"data.truncate = '{data.truncate or 'longest'}'; set more, or {' or '.join(others)}",
    )


def load_tokenizer(config: RunConfig, model_dir: Path) -> tuple[Any, int]:
    """Load the tokenizer and say what pads: its padding token, else its end token, which the attention mask hides.

    Raises
    ------
    ModelError
        There is no tokenizer, or it has neither.
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
    return tokenizer, int(pad)


def _checked_length(config: RunConfig, inputs: Inputs, tokenizer: Any, *, completes: bool) -> int:
    """Return data.max_length if the model can read as many tokens, and some of them are the row's own."""
    given = config.data.max_length
    limit = inputs.tokens
    if limit is not None and given > limit:
        raise DataError(f"data.max_length = {given}, but the model reads {limit} tokens. Set it to {limit} or less.")
    if completes and given < 2:
        raise DataError(f"data.max_length = {given}, but a prompt and a completion are two tokens. Set it to more.")
    if not completes:
        added = tokenizer.num_special_tokens_to_add(pair=config.data.text_pair is not None)
        if given <= added:
            raise DataError(f"data.max_length = {given}, but the tokenizer alone adds {added} tokens. Set it to more.")
    return given


def _ends(tokenizer: Any, end: int, rows: datasets.Dataset, max_length: int) -> tuple[int, int] | None:
    """Return the end token and how many of it the tokenizer adds to a row of its own accord; None if it adds none."""
    empty = {name: [""] for name in rows.column_names if name in ("text", "text_pair")}
    count = tokenise(tokenizer, empty, max_length)["input_ids"][0].count(end)
    return (end, count) if count else None


def _check_vocabulary(model_dir: Path, inputs: Inputs, tokenizer: Any, largest: int) -> None:
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


def tokenise(tokenizer: Any, batch: Mapping[str, list[Any]], max_length: int, truncate: Truncate = "longest") -> Tokens:
    """Tokenise a few rows; the one place where texts become tokens.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The base model's.
    batch : mapping of str to list
        Columns ``text`` and perhaps ``text_pair``, or ``conversation``.
    max_length : int
        Tokens kept of each row. Texts are cut at their end, of a pair the longer one first. A prompt is cut at its
        BEGINNING, a completion at its end.
    truncate : Truncate
        Which of the two gives way: ``longest``, the longer one until both are equal; ``prompt``, so that a completion
        of `max_length` or more leaves nothing of it; ``completion``, of which one token stays.

    Returns
    -------
    dict of str to list of list of int
        ``input_ids``, ``token_type_ids`` where the tokenizer makes them, ``prompt_lengths``, one number a row, and
        ``lost``, the tokens cut off a row's prompt and completion.
    """
    if "conversation" in batch:
        turns = [json.loads(row)["messages"] for row in batch["conversation"]]
        return _tokenise_completions(tokenizer, turns, max_length, truncate)
    tokenizer.truncation_side = "right"
    encoded = tokenizer(
        batch["text"],
        batch.get("text_pair"),
        truncation="longest_first",
        max_length=max_length,
        return_attention_mask=False,
    )
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def _tokenise_completions(
    tokenizer: Any, conversations: list[list[dict[str, Any]]], max_length: int, truncate: Truncate
) -> Tokens:
    """Tokenise conversations, of which the last turn is the completion and all before it the prompt.

    Without a chat template, a row is
    prompt, line break, completion, after the tokenizer's own start token and before its end token. What counts as
    completion ends with the end token: line breaks that a template writes after it are dropped.
    """
    start: list[int] = []
    if tokenizer.chat_template is not None:
        texts = [_render(tokenizer, turns) for turns in conversations]
    else:
        said = [[turn["content"] for turn in turns] for turns in conversations]
        texts = [("".join(f"{words}\n" for words in before), last) for *before, last in said]
        if tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            start = [tokenizer.bos_token_id]
    heads, wholes, tails = (
        tokenizer(part, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for part in ([head for head, _ in texts], [head + tail for head, tail in texts], [tail for _, tail in texts])
    )
    eos = tokenizer.eos_token_id
    encoded: Tokens = {"input_ids": [], "prompt_lengths": [], "lost": []}
    for head, whole, tail in zip(heads, wholes, tails, strict=True):
        # a model that answers sees the prompt alone: where a token would span the border, both are tokenised apart
        rest = whole[len(head) :] if whole[: len(head)] == head and len(whole) > len(head) else tail
        if eos is not None and tokenizer.chat_template is None:
            rest = [*rest, eos]
        elif eos in rest:
            rest = rest[: len(rest) - rest[::-1].index(eos)]
        before = [*start, *head]
        # the least that the prompt may keep, whatever the completion's length
        least = {"longest": max_length // 2, "prompt": 0, "completion": max_length - 1}[truncate]
        room = min(len(before), max(max_length - len(rest), least))
        kept, told = before[len(before) - room :], rest[: max_length - room]
        encoded["input_ids"].append([*kept, *told])
        encoded["prompt_lengths"].append([len(kept)])
        encoded["lost"].append([len(before) - len(kept), len(rest) - len(told)])
    return encoded


def _render(tokenizer: Any, turns: list[dict[str, Any]]) -> tuple[str, str]:
    """Write a conversation by the chat template, divided where the assistant's last words begin."""
    from jinja2 import TemplateError

    try:
        head = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise ModelError(
            "the tokenizer's chat template refuses a user's and an assistant's turn: "
            f"{first_line(error).rstrip('.')}. Save another one."
        ) from None
    border = next(
        (at for at, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole))
    )
    return whole[:border], whole[border:]
