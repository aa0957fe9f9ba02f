"""Turns of a conversation, in whatever words they were written down."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence

from fedpeft.data.layouts.record import FILL, SKIPPED, Conversation, UnfitRowError

# what roles are called in the wild, and what they are
ROLES: Mapping[str, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "function_call"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response"),
}
ROLE_OF = {said: role for role, names in ROLES.items() for said in names}
OPENAI, SHAREGPT = ("role", "content"), ("from", "value")
WORDS = ("text", "input_text", "output_text")  # what parts of a turn that are texts say of themselves
SHOWN = 40  # characters of a role that a message shows


def listed(cell: object) -> list[object] | None:
    """Return a cell as a list, which may be written down as JSON or as Python shows it; None where it is none."""
    if isinstance(cell, list):
        return cell
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(cell.strip())  # which knows constants only
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def says(turn: object, names: tuple[str, str]) -> bool:
    """Say whether a turn has its role and its words under these names."""
    return isinstance(turn, dict) and names[0] in turn and (names[1] in turn or turn.get("tool_calls") is not None)


def are_turns(cell: object, names: Sequence[tuple[str, str]] = (OPENAI, SHAREGPT)) -> bool:
    """Say whether a cell holds turns under one of these pairs of names."""
    first = next(iter(listed(cell) or ()), None)
    return isinstance(first, dict) and any(says(first, pair) and first[pair[0]] is not None for pair in names)


def conversation(cell: object, key: str, system: object = None) -> Conversation:
    """Make a conversation of a cell.

    Parameters
    ----------
    cell : object
        A list of turns, or a text that is one.
    key : str
        Names the column, for errors.
    system : object
        A system turn that stands in a column of its own.

    Raises
    ------
    UnfitRowError
        It holds no turns, or some that cannot be read, or none that is the assistant's, or two of the system.
    """
    messages = turns_of(cell, key)
    if isinstance(system, str) and system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    last = last_answer(messages, key)
    return Conversation(messages[: last + 1], dropped=len(messages) - last - 1)


def turns_of(cell: object, key: str) -> list[dict[str, object]]:
    """Return a cell's turns, in the words of `ROLES`; empty ones of the system are left out."""
    turns = listed(cell)
    if turns is None:
        raise UnfitRowError(key, "holds no list of turns", "Write a list of {role, content}, or such a list as JSON.")
    messages = [_turn(turn, number, key) for number, turn in enumerate(turns, start=1)]
    return [each for each in messages if each["content"] or each["role"] != "system"]


def last_answer(messages: Sequence[Mapping[str, object]], key: str) -> int:
    """Return which of some turns is the assistant's last.

    Raises
    ------
    UnfitRowError
        None is, or several are the system's.
    """
    if not messages:
        raise UnfitRowError(key, "has no messages", FILL, empty=True)
    if (count := sum(each["role"] == "system" for each in messages)) > 1:
        raise UnfitRowError(key, f"has {count} system turns", "Join them into one.")
    for at in range(len(messages) - 1, -1, -1):
        if messages[at]["role"] == "assistant":
            return at
    raise UnfitRowError(
        key,
        "has no turn of the assistant",
        f"There is nothing to learn from it: add an answer, {SKIPPED}.",
        empty=True,
    )


def _turn(turn: object, number: int, key: str) -> dict[str, object]:
    if not isinstance(turn, dict):
        raise UnfitRowError(key, f"has as turn {number} no object", "Write turns as {role, content} or {from, value}.")
    named = OPENAI if "role" in turn and turn["role"] is not None else SHAREGPT
    said = turn.get(named[0])
    if said is None:
        raise UnfitRowError(
            key, f"has a turn {number} without a role", "Write turns as {role, content} or {from, value}."
        )
    role = ROLE_OF.get(said.strip().casefold()) if isinstance(said, str) else None
    if role is None:
        shown = str(said) if len(str(said)) <= SHOWN else f"{str(said)[: SHOWN - 3]}..."
        raise UnfitRowError(
            key, f"has a turn {number} of the unknown role '{shown}'", f"Known are {', '.join(ROLE_OF)}."
        )
    more = {name: value for name, value in turn.items() if name not in named and value is not None}
    content = _content(turn.get(named[1]), number, key)
    if not content.strip():
        calls = more.get("tool_calls") or more.get("function_call")
        if role == "system":
            content = ""
        elif role != "tool" and not (role == "assistant" and calls):
            answer = role == "assistant"
            raise UnfitRowError(
                key,
                f"has an empty turn {number} ({role})",
                FILL if answer else "Fill it in or remove it.",
                empty=answer,
            )
    return {"role": role, "content": content, **more}


def _content(content: object, number: int, key: str) -> str:
    """Return the words of a turn: a text, or parts of which each is one."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        kind = type(content).__name__
        raise UnfitRowError(key, f"holds a {kind} as the content of turn {number}", "Give a text.")
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in WORDS else part
        if not isinstance(text, str):
            part_type = part.get("type") if isinstance(part, dict) else None
            shown = f"a part of type '{part_type[:SHOWN]}'" if isinstance(part_type, str) else "a part that is no text"
            raise UnfitRowError(
                key,
                f"holds {shown} in turn {number}",
                "Only texts can be trained on: leave it out, or the row.",
            )
        texts.append(text)
    return "".join(texts)
