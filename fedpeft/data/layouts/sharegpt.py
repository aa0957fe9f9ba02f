"""ShareGPT's chats: a list of turns with from and value in each row."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.data.layouts.record import Conversation, Layout
from fedpeft.data.layouts.turns import SHAREGPT as NAMES
from fedpeft.data.layouts.turns import are_turns, conversation


def _conversation(cells: Mapping[str, object]) -> Conversation:
    return conversation(cells["messages"], "messages", cells.get("system"))


SHAREGPT = Layout(
    "sharegpt",
    "turns with `from` and `value`, in a column `conversations`; a column `system` if there is one",
    {"messages": ("conversations", "messages", "conversation"), "system": ("system",)},
    keys=("messages",),
    optional=frozenset({"system"}),
    nested=frozenset({"messages"}),
    looks=lambda cells: are_turns(cells["messages"], [NAMES]),
    taught=frozenset({"messages"}),
    conversation=_conversation,
)
