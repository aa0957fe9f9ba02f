"""A ledger's lines, chained: none can be changed, moved, doubled or left out without breaking what stands behind it.

Each holds its number, the hash of the line before it, and its own.

    {"ledger": "5f0c...", "keeper": "site", "version": 2}
    {"run": "7", "client": "north", ..., "count": 1, "before": "<hash of line 0>", "hash": "<of all to its left>"}

A line is read only if it is, to the byte, what would be written for the charge that it holds. So there is one way to
write a charge: other spacing, other keys, keys twice, marks of an editor or numbers of another type are damage.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from fedpeft.errors import LedgerError
from fedpeft.privacy.accounting import Charge

Keeper = Literal["site", "run"]
VERSION = 2
MOST_NOISE = 1e6  # a hundred times what calibration ever gives; epsilon is nothing long before
MOST_STEPS = 2**53


@dataclass(frozen=True)
class Entry:
    """One charge.

    Parameters
    ----------
    run : str
        The run that it was for.
    client : str
        Whose rows were used; under client-level privacy `fedpeft.privacy.ledger.EVERYBODY`.
    round : int
        From 1.
    noise_multiplier : float
        See `fedpeft.privacy.accounting.Charge`.
    sample_rate : float
        See there.
    steps : int
        All planned steps of the message.
    release : str
        Hash of what a seeded training depends on; empty where no two trainings are the same.
    data : str
        Fingerprint of the rows, in a site's own ledger. Others would learn from it: who knows all rows but one may try
        what the last one is.
    """

    run: str
    client: str
    round: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    release: str = ""
    data: str = ""

    @property
    def charge(self) -> Charge:
        """What it costs."""
        return Charge(self.noise_multiplier, self.sample_rate, self.steps)

    def countable(self) -> Entry:
        """Return it as a ledger can hold it, which never costs less.

        Raises
        ------
        ValueError
            It is no charge.
        """
        bounded = replace(
            self,
            noise_multiplier=min(float(self.noise_multiplier), MOST_NOISE),
            sample_rate=float(self.sample_rate),
            steps=max(self.steps, 1),
        )
        return _checked(bounded)


@dataclass(frozen=True)
class Head:
    """A ledger's first line.

    Parameters
    ----------
    ledger : str
        Its own id, whatever its file is called.
    keeper : {"site", "run"}
        Whether a site keeps it over all runs, or it is a part of one run's directory.
    """

    ledger: str
    keeper: Keeper

    def line(self) -> bytes:
        """Return it as it is written, without the end of line."""
        return _json({"ledger": self.ledger, "keeper": self.keeper, "version": VERSION})


@dataclass(frozen=True)
class Link:
    """A line that was read: the entry in it, and what the next one must name."""

    entry: Entry | None
    hash: str


def head_link(line: bytes) -> tuple[Head, Link]:
    """Read a ledger's first line.

    Raises
    ------
    ValueError
        It is none.
    """
    found = _object(line)
    ledger, keeper = found.get("ledger"), found.get("keeper")
    if not (isinstance(ledger, str) and re.fullmatch("[0-9a-f]{32}", ledger) and keeper in get_args(Keeper)):
        raise ValueError(line)
    head = Head(ledger, cast(Keeper, keeper))
    if head.line() != line:
        raise ValueError(line)
    return head, Link(None, hashlib.sha256(line).hexdigest())


def entry_line(entry: Entry, count: int, before: str) -> bytes:
    """Return a charge as it is written, without the end of line.

    Parameters
    ----------
    entry : Entry
        See `Entry.countable`.
    count : int
        Its number, from 1.
    before : str
        Hash of the line before it.
    """
    body = _json({**asdict(entry), "count": count, "before": before})
    return body[:-1] + b', "hash": "' + hashlib.sha256(body).hexdigest().encode() + b'"}'


def entry_link(line: bytes, count: int, before: str) -> Link:
    """Read a charge.

    Raises
    ------
    ValueError
        It is none, or not the one that belongs there.
    """
    found = _object(line)
    try:
        entry = _checked(Entry(**{field.name: found[field.name] for field in fields(Entry)}))
    except KeyError:
        raise ValueError(line) from None
    if entry_line(entry, count, before) != line:
        raise ValueError(line)
    return Link(entry, str(found["hash"]))


def _unchained(line: bytes) -> Entry:
    """Read a line of a ledger of earlier versions, whose lines hold a charge and nothing else.

    Raises
    ------
    ValueError
        It is none.
    """
    found = _object(line)
    if found.keys() != {field.name for field in fields(Entry)}:
        raise ValueError(line)
    return _checked(Entry(**found))


def is_unchained(line: bytes) -> bool:
    """Tell whether a ledger's first line is of an earlier version."""
    try:
        return "noise_multiplier" in _object(line)
    except ValueError:
        return False


def read_unchained(path: Path) -> list[Entry]:
    """Return the charges of a ledger of an earlier version; all of them, or none.

    Raises
    ------
    LedgerError
        It cannot be read, or a line of it is no charge.
    """
    try:
        lines = path.expanduser().read_bytes().split(b"\n")
    except OSError as error:
        raise LedgerError(f"cannot read the privacy ledger '{path}': {error.strerror or error}.") from None
    entries = []
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            entries.append(_unchained(line))
        except (ValueError, TypeError):
            raise LedgerError(
                f"line {number} of '{path}' is no charge of a privacy ledger of an earlier version, whose lines are "
                "not chained: none of its charges are copied. Give a whole one."
            ) from None
    return entries


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError(line) from None
    if not isinstance(found, dict):
        raise ValueError(line)
    return found


def _checked(entry: Entry) -> Entry:
    """Return an entry whose values are of the right types and ranges: they may come from anywhere."""
    texts = (entry.run, entry.client, entry.release, entry.data)
    noise, rate = entry.noise_multiplier, entry.sample_rate
    # exact types, since bool is an int
    right = all(type(text) is str for text in texts) and type(entry.round) is int and type(entry.steps) is int
    right = right and all(type(value) is float and math.isfinite(value) for value in (noise, rate))
    right = right and 0 <= noise <= MOST_NOISE and 0 < rate <= 1
    if not (right and 1 <= entry.steps < MOST_STEPS and abs(entry.round) < MOST_STEPS):
        raise ValueError(entry)
    return entry


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
