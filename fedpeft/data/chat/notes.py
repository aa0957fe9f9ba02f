"""What is said of rows that could not be encoded whole."""

from __future__ import annotations

from typing import get_args

from fedpeft.config import RunConfig, Truncate
from fedpeft.data.chat.rows import LOSSES
from fedpeft.places import Place

Cuts = dict[str, int]  # rows, by what became of them

_WORDS = {
    "turns": "lose whole early turns",
    "whole prompt": "lose the whole prompt",
    "prompt": "lose the beginning of the prompt",
    "completion": "lose the end of the completion",
    "text": "lose the end of the text",
}


def no_cuts() -> Cuts:
    """Return counts of rows that were cut, skipped or changed, all nought."""
    return dict.fromkeys((*LOSSES, "empty", "folded"), 0)


def cut_notes(config: RunConfig, place: Place, count: int, cuts: Cuts, max_length: int) -> tuple[str, ...]:
    """Say in one line each how many of a place's rows were cut, skipped or changed, and what alters that.

    Parameters
    ----------
    config : RunConfig
        Says what gives way.
    place : Place
        Where the rows lie.
    count : int
        How many there are.
    cuts : dict of str to int
        Rows by what became of them, as `no_cuts` names it.
    max_length : int
        Tokens kept of each row.
    """
    said: list[str] = []
    if lost := [f"{cuts[name]:,} {words}" for name, words in _WORDS.items() if cuts[name]]:
        way = config.data.truncate or "longest"
        others = " or ".join(repr(name) for name in get_args(Truncate) if name != way)
        told = f"of {count:,} rows of {place} {', '.join(lost)}, cut to data.max_length = {max_length}"
        if cuts["text"]:
            said.append(f"{told}; set more")
        else:
            said.append(f"{told} with data.truncate = '{way}'; set more of the one, or of the other {others}")
    if cuts["empty"]:
        said.append(
            f"{cuts['empty']:,} rows of {place} have no token that the loss counts and are skipped, as data.empty says"
        )
    if cuts["folded"]:
        said.append(
            f"the chat template has no place for a system's turn: in {cuts['folded']:,} rows of {place} it stands at "
            "the head of the first user's"
        )
    return tuple(said)
