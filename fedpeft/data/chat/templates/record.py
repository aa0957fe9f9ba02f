"""What is known of a chat template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are written as one text.

    Parameters
    ----------
    name : str
        What `data.template` takes.
    text : str or None
        Jinja as transformers' ``apply_chat_template`` reads it, answers between ``{% generation %}`` and
        ``{% endgeneration %}``; None where a row is prompt, line break and completion.
    """

    name: str
    text: str | None
