"""Alpaca's instructions, perhaps with an input, and the output; and Dolly's, who calls them context and response."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.data.layouts.record import Conversation, Layout, UnfitRowError
from fedpeft.data.layouts.turns import listed


def _conversation(cells: Mapping[str, object]) -> Conversation:
    instruction, output = str(cells["prompt"]), str(cells["completion"])
    given = str(cells.get("input") or "")
    given = given if given.strip() else ""
    messages: list[dict[str, object]] = []
    system = cells.get("system")
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system})
    for asked, answered in _history(cells.get("history")):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    content = f"{instruction}\n\n{given}" if given else instruction
    messages.append({"role": "user", "content": content, "instruction": instruction, "input": given})
    messages.append({"role": "assistant", "content": output})
    return Conversation(messages, completion=1)


def _history(cell: object) -> list[tuple[str, str]]:
    """Return earlier exchanges, as LLaMA-Factory writes them: pairs of what was asked and answered."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    pairs = listed(cell)
    if pairs is None:
        raise UnfitRowError("history", "holds no list of exchanges", "Write pairs of an instruction and its output.")
    exchanges = []
    for number, pair in enumerate(pairs, start=1):
        words = pair if isinstance(pair, list) else []
        if len(words) != 2 or not all(isinstance(each, str) and each.strip() for each in words):
            raise UnfitRowError(
                "history", f"has as exchange {number} no pair of texts", "Write pairs of an instruction and its output."
            )
        exchanges.append((words[0], words[1]))
    return exchanges


ALPACA = Layout(
    "alpaca",
    "`instruction`, `input` (or `context`) and `output` (or `response`), all texts; `system` and `history` "
    "if there are any",
    {
        "prompt": ("instruction",),
        "input": ("input", "context"),
        "completion": ("output", "response"),
        "system": ("system",),
        "history": ("history",),
    },
    optional=frozenset({"input", "system", "history"}),
    nested=frozenset({"history"}),
    taught=frozenset({"completion"}),
    conversation=_conversation,
)
