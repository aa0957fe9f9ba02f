"""What of a conversation gives way where it is too long: early exchanges, then words; never who speaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedpeft.config import Truncate
from fedpeft.data.chat.tokenising import Written


@dataclass(frozen=True)
class Limits:
    """Most tokens of a row, and which part of it gives way."""

    max_length: int
    truncate: Truncate = "longest"


@dataclass(frozen=True)
class Room:
    """How many tokens what stands before the last answer has too many, as things stand."""

    excess: int

    @property
    def fits(self) -> bool:
        """Whether it has none."""
        return self.excess == 0


def room_for(limits: Limits, before: int, rest: int) -> Room:
    """Divide a row between what stands before its last answer and that answer.

    Parameters
    ----------
    limits : Limits
        ``longest`` lets the longer of both give way until they are equal; ``prompt`` what stands before; ``completion``
        the answer, of which one token stays.
    before, rest : int
        Tokens of both.
    """
    longest = limits.max_length
    # the least that the prompt may keep, whatever the completion's length
    least = {"longest": longest // 2, "prompt": 0, "completion": longest - 1}[limits.truncate]
    return Room(before - min(before, max(longest - rest, least)))


def without_early(roles: Sequence[str], last: int, fits: Callable[[int, int], bool]) -> tuple[int, int] | None:
    """Find how few of a conversation's early exchanges can be left out so that the rest fits.

    Parameters
    ----------
    roles : sequence of str
        Who speaks in each turn.
    last : int
        Which turn is the last answer.
    fits : callable
        Tells of a first turn to keep, and the number of system turns kept before, whether that is short enough.

    Returns
    -------
    tuple of int or None
        That first turn and that number; the last exchange where even it does not fit. None where there is but one.
    """
    systems = next((at for at, role in enumerate(roles) if role != "system"), len(roles))
    starts = [at for at in range(systems, last) if roles[at] == "user" and at > systems]
    # of several users' turns in a row the first begins the exchange
    starts = [at for at in starts if roles[at - 1] != "user"]
    if not starts:
        return None
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(starts[middle], systems) else (middle + 1, high)
    return starts[low], systems


def removed(tokens: Written, turns: Sequence[tuple[str, str]], answer: int, excess: int) -> list[int]:
    """Choose tokens to cut before the last answer: the turns' words from their beginning, those of system turns last.

    Parameters
    ----------
    tokens : Written
        The row.
    turns : sequence of tuple of str
        Who speaks in each turn before the last answer, and what is said.
    answer : int
        Place of that answer's first token.
    excess : int
        How many to choose, if there are as many.
    """
    if excess <= 0:
        return []
    text, place = tokens.rendered.text, 0
    first: list[int] = []
    later: list[int] = []
    for role, said in turns:
        start = text.find(said, place) if said else -1
        if start < 0:  # the template wrote it in other words: what it made of them stays
            continue
        place = start + len(said)
        inside = (tokens.starts >= start) & (tokens.ends <= place) & (tokens.ends > tokens.starts)
        (later if role == "system" else first).extend(np.flatnonzero(inside[:answer]).tolist())
    return sorted([*first, *later][:excess])
