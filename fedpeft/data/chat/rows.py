"""What a row of turns, or of raw text, becomes: its tokens, which of them count, and what it lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import TrainOn, Truncate
from fedpeft.data.chat.cutting import Limits, Room, removed, room_for, without_early
from fedpeft.data.chat.rendering import Message, Renderer, words_of
from fedpeft.data.chat.templates import choices
from fedpeft.data.chat.tokenising import Written, written
from fedpeft.errors import DataError

_ASSISTANT = "assistant"
LOSSES = ("turns", "prompt", "whole prompt", "completion", "text")  # what a row can lose


@dataclass(frozen=True, eq=False)
class Row:
    """An encoded row.

    Parameters
    ----------
    ids : array of int32, shape (t,)
        Its tokens.
    counted : array of bool, shape (t,)
        Which of them the loss counts.
    answer : int
        Place of the first token of the last answer; 0 where there is none.
    reference : str
        The last answer's whole text.
    cut : int
        Tokens that it lost.
    lost : frozenset of str
        What, of `LOSSES`.
    folded : bool
        Whether a system's turn stands in the first user's, since the template has no place for it.
    why : str
        Why nothing is left of it, where nothing is: a line that names the row.
    """

    ids: NDArray[np.int32]
    counted: NDArray[np.bool_]
    answer: int = 0
    reference: str = ""
    cut: int = 0
    lost: frozenset[str] = frozenset()
    folded: bool = False
    why: str = ""

    @property
    def counts(self) -> bool:
        """Whether the loss counts any token; of the first nothing before it could tell."""
        return bool(self.counted[1:].any())


@dataclass(frozen=True)
class _Read:
    """A row as read: turns, how many of the last are its completion, and what messages call it."""

    turns: tuple[Message, ...]
    completion: int
    where: str

    @property
    def last(self) -> int:
        """Which turn is the last answer; -1 where there is none."""
        return max((at for at, turn in enumerate(self.turns) if turn.get("role") == _ASSISTANT), default=-1)

    @property
    def reference(self) -> str:
        return words_of(self.turns[self.last]) if self.last >= 0 else ""

    def from_turn(self, first: int, kept: int) -> _Read:
        """Leave out turns between the first `kept` and `first`."""
        return _Read((*self.turns[:kept], *self.turns[first:]), self.completion, self.where)


class RowEncoder:
    """Encodes rows of turns or of raw text.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The base model's, of which the chat template is the effective one.
    max_length : int
        Most tokens of a row.
    truncate : {"longest", "prompt", "completion"}
        What gives way where a row is longer.
    train_on : {"assistant", "completion", "all", "last"}
        Which tokens count.

    Raises
    ------
    ModelError
        The chat template refuses a user's and an assistant's turn.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, truncate: Truncate = "longest", train_on: TrainOn = "assistant"
    ):
        self.tokenizer = tokenizer
        self.limits = Limits(max_length, truncate)
        self.train_on = train_on
        self.renderer = None if tokenizer.chat_template is None else Renderer(tokenizer)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._start: list[int] = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
        self._end: list[int] = [] if eos is None else [eos]

    def rows(self, batch: Mapping[str, list[Any]], names: Sequence[str]) -> list[Row]:
        """Encode a few rows.

        Parameters
        ----------
        batch : mapping of str to list
            Column ``conversation``, JSON of ``messages`` and ``completion``; or ``text``.
        names : sequence of str
            What messages call each row.

        Raises
        ------
        DataError
            A row's turns cannot be written, or no length of it would keep what the template writes.
        """
        if "text" in batch:
            return self._raw(batch["text"])
        read = [_Read(*_parsed(cell), where) for cell, where in zip(batch["conversation"], names, strict=True)]
        if self.train_on == "completion":
            for row in read:
                if not row.completion:
                    raise DataError(
                        f"{row.where} names no completion, which data.train_on = 'completion' counts alone. Set it to "
                        "'assistant' (all answers), 'last' (the last one) or 'all'."
                    )
        if self.renderer is None:
            return self._plain(read)
        whole = self._written(read)
        return [self._row(row, tokens) for row, tokens in zip(read, whole, strict=True)]

    # --- by a template ---------------------------------------------------------------------------------------------

    def _written(self, read: Iterable[_Read]) -> list[Written]:
        assert self.renderer is not None
        rendered = [self.renderer.render(row.turns, row.where) for row in read]
        return written(self.tokenizer, rendered, marked=self.renderer.marked)

    def _row(self, read: _Read, tokens: Written) -> Row:
        """Return a row, cut if it is too long: whole early turns first, then words, never what the template writes."""
        assert self.renderer is not None
        answer, reference, length = _answer(read, tokens), read.reference, self._length(read, tokens)
        folded = self.renderer.folds and read.turns[0].get("role") == "system"
        if length <= self.limits.max_length:
            ids, counted = self._told(read, tokens)
            return Row(ids, counted, answer, reference, folded=folded)
        lost: set[str] = set()
        tokens = _up_to_answer(read, tokens)
        if not self._room(read, tokens).fits and (first := self._later(read)):
            lost.add("turns")
            read = read.from_turn(*first)
            (tokens,) = self._written([read])
            tokens = _up_to_answer(read, tokens)
            answer = _answer(read, tokens)
        ids, counted = self._told(read, tokens)
        room = room_for(self.limits, answer, len(ids) - answer)
        before = [(str(turn.get("role")), words_of(turn).strip()) for turn in read.turns[: max(read.last, 0)]]
        gone = removed(tokens, before, answer, room.excess)
        answer -= len(gone)
        if gone:
            lost.add("prompt")
        ids, counted = np.delete(ids, gone), np.delete(counted, gone)
        if answer >= self.limits.max_length:
            why = (
                f"{read.where}: data.max_length = {self.limits.max_length}, but what the chat template writes around "
                f"the turns is {answer} tokens by itself. Set it to more than that, or data.empty = 'skip' to leave "
                "such rows out."
            )
            return Row(ids[:0], counted[:0], 0, reference, length, folded=folded, why=why)
        if len(ids) > self.limits.max_length:
            lost.add("completion" if read.last >= 0 else "text")
            ids, counted = ids[: self.limits.max_length], counted[: self.limits.max_length]
        return Row(ids, counted, answer, reference, length - len(ids), frozenset(lost), folded)

    def _later(self, read: _Read) -> tuple[int, int] | None:
        """Return at which turn to begin, and how many system turns to keep before it."""
        roles = [str(turn.get("role")) for turn in read.turns]

        def fits(first: int, kept: int) -> bool:
            rest = read.from_turn(first, kept)
            (tokens,) = self._written([rest])
            return self._room(rest, _up_to_answer(rest, tokens)).fits

        return without_early(roles, read.last, fits)

    def _room(self, read: _Read, tokens: Written) -> Room:
        answer = _answer(read, tokens)
        return room_for(self.limits, answer, self._length(read, tokens) - answer)

    def _length(self, read: _Read, tokens: Written) -> int:
        return len(tokens.ids) + (len(self._end) if self._ends_here(read) else 0)

    def _ends_here(self, read: _Read) -> bool:
        """Tell whether a row ends with an answer after which the template writes no end of turn."""
        assert self.renderer is not None
        return not self.renderer.stops and bool(read.turns) and read.last == len(read.turns) - 1

    def _told(self, read: _Read, tokens: Written) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return a row's tokens, an end token among them if the template writes none, and which of them count."""
        ids, counted = tokens.ids, np.zeros(len(tokens.ids), dtype=np.bool_)
        told = [answer for answer in tokens.answers if self._tells(read, answer.turn)]
        if self.train_on == "all":
            counted[:] = True
        elif self.train_on == "completion" and told:  # what other roles say within it too, as TRL has it
            counted[told[0].start : told[-1].end] = True
            for answer in tokens.answers:
                if not self._tells(read, answer.turn):
                    counted[answer.start : answer.end] = False
        else:
            for answer in told:
                counted[answer.start : answer.end] = True
        if self._ends_here(read) and self._end:
            ends = self.train_on == "all" or self._tells(read, read.last)
            ids, counted = np.append(ids, np.array(self._end, dtype=np.int32)), np.append(counted, ends)
        return ids, counted

    def _tells(self, read: _Read, turn: int) -> bool:
        """Tell whether an answer's tokens count; OpenAI's rows may say of single ones that they do not."""
        if read.turns[turn].get("weight") == 0:
            return False
        if self.train_on == "last":
            return turn == read.last
        return self.train_on != "completion" or turn >= len(read.turns) - read.completion

    # --- without a template ----------------------------------------------------------------------------------------

    def _plain(self, read: Sequence[_Read]) -> list[Row]:
        """Encode prompt, line break, completion, after the tokenizer's own start token and before its end token."""
        for row in read:
            if row.last != len(row.turns) - 1 or row.last < 1 or _answers(row.turns) != 1:
                raise DataError(
                    f"{row.where} is a conversation, and without a chat template only a prompt and its completion can "
                    f"be written. Set data.template to {choices()}, or save a chat template with the tokenizer."
                )
        heads = ["".join(f"{words_of(turn)}\n" for turn in row.turns[:-1]) for row in read]
        tails = [row.reference for row in read]
        before, whole, after = (
            self.tokenizer(part, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            for part in (heads, [head + tail for head, tail in zip(heads, tails, strict=True)], tails)
        )
        return [
            self._completed(row, head, text, tail)
            for row, head, text, tail in zip(read, before, whole, after, strict=True)
        ]

    def _completed(self, read: _Read, head: list[int], whole: list[int], tail: list[int]) -> Row:
        # a model that answers sees the prompt alone: where a token would span the border, both are tokenised apart
        rest = whole[len(head) :] if whole[: len(head)] == head and len(whole) > len(head) else tail
        before, rest = [*self._start, *head], [*rest, *self._end]
        room = room_for(self.limits, len(before), len(rest))
        kept = before[room.excess :]
        told = rest[: self.limits.max_length - len(kept)]
        lost = {
            "whole prompt" if not kept else "prompt": len(kept) < len(before),
            "completion": len(told) < len(rest),
        }
        counted = np.arange(len(kept) + len(told)) >= (0 if self.train_on == "all" else len(kept))
        if self.train_on != "all" and not self._tells(read, read.last):
            counted[:] = False
        return Row(
            np.array([*kept, *told], dtype=np.int32),
            counted,
            len(kept),
            read.reference,
            len(before) + len(rest) - len(kept) - len(told),
            frozenset(name for name, is_so in lost.items() if is_so),
        )

    def _raw(self, texts: list[str]) -> list[Row]:
        """Encode raw texts, of which every token counts, an end token behind each."""
        encoded = self.tokenizer(texts, return_attention_mask=False)["input_ids"]
        rows = []
        for ids in encoded:
            whole = ids if not self._end or ids[-1:] == self._end else [*ids, *self._end]
            kept = np.array(whole[: self.limits.max_length], dtype=np.int32)
            cut = len(whole) - len(kept)
            rows.append(Row(kept, np.ones(len(kept), dtype=np.bool_), cut=cut, lost=frozenset({"text"} if cut else ())))
        return rows


def _up_to_answer(read: _Read, tokens: Written) -> Written:
    """Return a row without what its template writes behind the last answer: the first to go, as nobody reads it."""
    if not tokens.answers or tokens.answers[-1].turn != len(read.turns) - 1:
        return tokens
    end = tokens.answers[-1].end
    return replace(tokens, ids=tokens.ids[:end], starts=tokens.starts[:end], ends=tokens.ends[:end])


def _parsed(cell: str) -> tuple[tuple[Message, ...], int]:
    held = json.loads(cell)
    return tuple(held["messages"]), int(held.get("completion") or 0)


def _answers(turns: Sequence[Message]) -> int:
    return sum(turn.get("role") == _ASSISTANT for turn in turns)


def _answer(read: _Read, tokens: Written) -> int:
    """Return the place of the last answer's first token; 0 where there is none."""
    return next((answer.start for answer in tokens.answers if answer.turn == read.last), 0)
