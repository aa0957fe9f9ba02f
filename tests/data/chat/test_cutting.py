"""What gives way of a conversation that is too long: every style, cut by hand as well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

import pytest
from transformers import PreTrainedTokenizerFast

from fedpeft.config import Truncate
from fedpeft.data.chat.rows import Row, RowEncoder
from tests.data.chat.styles import STYLES, Style, Turn, letters, talk


def encoded(tokenizer: Any, turns: Sequence[Turn], max_length: int = 4096, **how: Any) -> Row:
    cell = json.dumps({"messages": list(turns), "completion": 0}, ensure_ascii=False)
    (row,) = RowEncoder(tokenizer, max_length, **how).rows({"conversation": [cell]}, ["row 1"])
    return row


class ByHand:
    """A style's rows as written by hand: tokens, which count, and how many stand before the last answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, style: Style) -> None:
        self._tokenizer, self._style = tokenizer, style
        self._known: dict[str, list[int]] = {}

    def row(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool], int]:
        if not self._style.systems and turns[0]["role"] == "system":
            joined = f"{turns[0]['content']}\n\n{turns[1]['content']}"
            turns = [{"role": "user", "content": joined}, *turns[2:]]
        parts = self._style.parts(turns)
        while not parts[-1][1]:  # what no answer needs
            parts.pop()
        ids = [self._ids(text) for text, _ in parts]
        mask = [counts for part, (_, counts) in zip(ids, parts, strict=True) for _ in part]
        return [token for part in ids for token in part], mask, len(mask) - len(ids[-1])

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]


def without_exchanges(turns: Sequence[Turn], count: int) -> list[Turn]:
    systems = [turn for turn in turns if turn["role"] == "system"]
    return [*systems, *turns[len(systems) + 2 * count :]]


def without_words(turns: Sequence[Turn], excess: int) -> list[Turn]:
    """Take letters from what stands before the last answer, from the beginning, those of the system last."""
    left = [dict(turn) for turn in turns]
    for turn in sorted(left[:-1], key=lambda turn: turn["role"] == "system"):  # which keeps the order of others
        gone = min(excess, len(turn["content"]))
        turn["content"], excess = turn["content"][gone:], excess - gone
    return left


def cut_by_hand(
    hand: ByHand, turns: Sequence[Turn], limit: int, way: Truncate
) -> tuple[list[int], list[bool], set[str]] | None:
    """Return tokens, mask and what is lost; None where what the template writes leaves no room for an answer."""
    answers = sum(turn["role"] == "assistant" for turn in turns)
    lost: set[str] = set()
    for gone in range(answers):
        rest = without_exchanges(turns, gone)
        ids, mask, before = hand.row(rest)
        told = len(ids) - before
        least = {"longest": limit // 2, "prompt": 0, "completion": limit - 1}[way]
        room = max(limit - told, least)
        if before <= room:
            break
    if gone:
        lost.add("turns")
    if before > room:
        words = without_words(rest, before - room)
        assert words != rest
        lost.add("prompt")
        ids, mask, before = hand.row(words)
    if before >= limit:
        return None
    if len(ids) > limit:
        lost.add("completion")
    return ids[:limit], mask[:limit], lost


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
@pytest.mark.parametrize("way", get_args(Truncate))
def test_what_is_too_long_loses_what_it_would_by_hand(style: Style, way: Truncate) -> None:
    tokenizer = letters(style.template, style.eos)
    hand, cut = ByHand(tokenizer, style), 0
    for answers in range(1, 6):
        for system in (False, True):
            turns = talk(answers, system=system)
            ids = hand.row(turns)[0]
            for limit in sorted({len(ids) + 1, len(ids), len(ids) - 1, len(ids) * 2 // 3, len(ids) // 3, 48, 24}):
                row, wanted = encoded(tokenizer, turns, limit, truncate=way), cut_by_hand(hand, turns, limit, way)
                if wanted is None:
                    assert not row.counts
                    assert "what the chat template writes around the turns" in row.why
                    continue
                assert (row.ids.tolist(), row.counted.tolist(), set(row.lost)) == wanted
                assert row.cut == len(ids) - len(row.ids)
                assert row.counted[row.answer :].all()
                cut += bool(row.lost)
    assert cut > 20
