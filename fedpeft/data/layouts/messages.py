"""OpenAI's chats: a list of turns with role and content in each row."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.data.layouts.record import Conversation, Layout
from fedpeft.data.layouts.turns import OPENAI, are_turns, conversation


def _conversation(cells: Mapping[str, object]) -> Conversation:
    return conversation(cells["messages"], "messages", cells.get("system"))


MESSAGES = Layout(
    "messages",
    "turns with `role` and `content`, in a column `messages`, or as the row itself",
    {"messages": ("messages", "conversations", "conversation"), "system": ("system",)},
    keys=("messages",),
    optional=frozenset({"system"}),
    nested=frozenset({"messages"}),
    looks=lambda cells: are_turns(cells["messages"], [OPENAI]),
    taught=frozenset({"messages"}),
    conversation=_conversation,
)
