"""No template: a prompt, a line break and its completion, for bases that have never seen a conversation."""

from __future__ import annotations

from fedpeft.data.chat.templates.record import ChatTemplate

NONE = ChatTemplate("none", None)
