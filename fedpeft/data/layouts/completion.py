"""Prompts and completions: two texts, or two lists of turns."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.data.layouts.record import Conversation, Layout, UnfitRowError
from fedpeft.data.layouts.turns import are_turns, last_answer, turns_of


def _side(cells: Mapping[str, object], key: str, role: str) -> list[dict[str, object]]:
    cell = cells[key]
    if are_turns(cell):
        return turns_of(cell, key)
    if isinstance(cell, list | dict):
        raise UnfitRowError(
            key, "holds neither a text nor a list of turns", "Give a text, or a list of {role, content}."
        )
    return [{"role": role, "content": str(cell)}]


def _conversation(cells: Mapping[str, object]) -> Conversation:
    asked, told = _side(cells, "prompt", "user"), _side(cells, "completion", "assistant")
    last = last_answer(told, "completion")
    messages = [*asked, *told[: last + 1]]
    if asked and asked[0]["role"] == "system":
        last_answer(messages, "prompt")  # which refuses a second one
    return Conversation(messages, completion=last + 1, dropped=len(told) - last - 1)


COMPLETION = Layout(
    "completion",
    "`prompt` and `completion`, texts or lists of turns",
    {"prompt": ("prompt",), "completion": ("completion",)},
    keys=("prompt", "completion"),
    nested=frozenset({"prompt", "completion"}),
    taught=frozenset({"completion"}),
    conversation=_conversation,
)
