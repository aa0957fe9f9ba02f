"""The chat templates that `data.template` can name, one file each.

Nothing heavy is imported: a command may ask for names before anything is loaded.
"""

from __future__ import annotations

from fedpeft.config import DataConfig
from fedpeft.config.data import TEMPLATE_SUFFIXES, is_template
from fedpeft.data.chat.templates.alpaca import ALPACA
from fedpeft.data.chat.templates.chatml import CHATML
from fedpeft.data.chat.templates.none import NONE
from fedpeft.data.chat.templates.record import ChatTemplate as ChatTemplate
from fedpeft.data.chat.templates.vicuna import VICUNA
from fedpeft.errors import ConfigError
from fedpeft.places import at
from fedpeft.registry import Registry

TEMPLATES: Registry[ChatTemplate] = Registry("chat template", "fedpeft.templates", (ALPACA, VICUNA, CHATML, NONE))


def choices() -> str:
    """Say what `data.template` may be."""
    return f"{', '.join(TEMPLATES.all())} or a FILE.jinja"


def chosen(data: DataConfig) -> ChatTemplate | None:
    """Return the template that `data.template` names or is; None where it is unset and the tokenizer's own counts.

    Raises
    ------
    ConfigError
        There is none of that name, or the file cannot be read.
    """
    if data.template is None:
        return None
    if is_template(data.template):
        return ChatTemplate("text", data.template)
    if not data.template.endswith(TEMPLATE_SUFFIXES):
        return TEMPLATES.find(data.template)
    try:
        text = at(data.template).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"data.template = '{data.template}' cannot be read: {reason}. Name a file of Jinja, or {choices()}."
        ) from None
    if not text.strip():
        raise ConfigError(f"data.template = '{data.template}' is empty. Write a chat template, or name {choices()}.")
    return ChatTemplate(data.template, text)
