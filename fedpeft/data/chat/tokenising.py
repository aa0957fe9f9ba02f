"""Rendered conversations as tokens, and which tokens are whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.chat.rendering import Rendered

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """An answer's tokens, `start` to `end` of a row's, the end of turn included."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Written:
    """A conversation's text as tokens.

    Parameters
    ----------
    ids : array of int32, shape (t,)
        The tokens.
    starts, ends : array of int64, shape (t,)
        The characters of the text that each stands for.
    answers : tuple of Answer
        In order.
    rendered : Rendered
        The text.
    """

    ids: NDArray[np.int32]
    starts: Places
    ends: Places
    answers: tuple[Answer, ...]
    rendered: Rendered


def written(tokenizer: Any, rows: Sequence[Rendered], *, marked: bool) -> list[Written]:
    """Tokenise rendered conversations, each as one text.

    An answer's tokens are those that hold any of its characters. A model that answers sees what stands before its
    answer alone: where a token would span an answer's start, and the template does not mark answers, the text is
    tokenised in two parts that meet there.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The base model's.
    rows : sequence of Rendered
        What the template wrote.
    marked : bool
        Whether the template marks answers. The ids are then those of the whole text whatever its tokens span, as
        transformers' ``apply_chat_template`` has it.
    """
    if not tokenizer.is_fast:  # which cannot say what characters a token stands for
        return [_of(row, *_apart(tokenizer, row.text, _borders(row))) for row in rows]
    encoded = tokenizer(
        [row.text for row in rows],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
    )
    found = []
    for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        tokens = (np.array(ids, dtype=np.int32), places[:, 0], places[:, 1])
        if not marked and (split := _spanned(tokenizer, row, *tokens)):
            tokens = _apart(tokenizer, row.text, split)
        found.append(_of(row, *tokens))
    return found


def _borders(row: Rendered) -> list[int]:
    return sorted({place for span in row.spans for place in (span.start, span.end)})


def _of(row: Rendered, ids: NDArray[np.int32], starts: Places, ends: Places) -> Written:
    firsts = np.searchsorted(ends, [span.start for span in row.spans], side="right")
    lasts = np.searchsorted(starts, [span.end for span in row.spans], side="left")
    answers = tuple(
        Answer(span.turn, int(first), max(int(first), int(last)))
        for span, first, last in zip(row.spans, firsts, lasts, strict=True)
    )
    return Written(ids, starts, ends, answers, row)


def _spanned(tokenizer: Any, row: Rendered, ids: NDArray[np.int32], starts: Places, ends: Places) -> list[int]:
    """Return where answers start amid a token."""
    found = []
    for span in row.spans:
        at = int(np.searchsorted(ends, span.start, side="right"))
        # some tokenizers do not say that a token holds the space before its word: it begins where the last one ended
        before = int(ends[at - 1]) if at else 0
        if at == len(ids) or before >= span.start:
            continue
        head = tokenizer(row.text[: span.start], add_special_tokens=False)["input_ids"]
        if head != ids[:at].tolist():
            found.append(span.start)
    return found


def _apart(tokenizer: Any, text: str, borders: Sequence[int]) -> tuple[NDArray[np.int32], Places, Places]:
    """Tokenise the parts of a text each for itself."""
    ids: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for first, last in zip([0, *borders], [*borders, len(text)], strict=True):
        part = tokenizer(
            text[first:last],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast,
        )
        ids += part["input_ids"]
        offsets = part["offset_mapping"] if tokenizer.is_fast else [(0, last - first)] * len(part["input_ids"])
        starts += [first + start for start, _ in offsets]
        ends += [first + end for _, end in offsets]
    return np.array(ids, dtype=np.int32), np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
