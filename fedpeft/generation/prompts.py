"""What a user types, as the tokens that a model answers to: the way the rows of its training were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedpeft.bases import first_line
from fedpeft.data.chat.rendering import Renderer
from fedpeft.errors import ModelError


def prompt_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """Return the tokens up to where the assistant's words begin, ``(t,)``.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        See `fedpeft.data.tokens.load_tokenizer`.
    messages : sequence of mapping
        Turns, with ``role`` and ``content``; the last is the user's. Without a chat template it alone is read,
        behind a system's, as rows without one are of a single exchange: the prompt, and a line break.

    Raises
    ------
    ModelError
        The template refuses such turns.
    """
    if tokenizer.chat_template is None:
        turns = [each for each in messages[:-1] if each["role"] == "system"] + [messages[-1]]
        return text_tokens(tokenizer, "".join(f"{each['content']}\n" for each in turns))
    renderer = Renderer(tokenizer)
    try:
        (text,) = renderer.texts([renderer.folded(messages)], opened=True)
    except Exception as error:  # a template raises whatever it likes
        raise ModelError(f"the chat template refuses these turns: {first_line(error).rstrip('.')}.") from None
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def text_tokens(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of a text that is to be continued, ``(t,)``."""
    start = [tokenizer.bos_token_id] if _starts(tokenizer) else []
    return torch.tensor([*start, *tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.int64)


def _starts(tokenizer: Any) -> bool:
    """Tell whether the tokenizer puts its start token before a text of its own accord."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
