"""JSON as this package writes it: strict, and never by a guess.

A value that JSON has no form for is an error where it is written. ``json.dumps(default=str)`` would write a set as
``"set()"``, which nobody can read again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import PurePath
from typing import Any


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True) -> str:
    """Return a value as strict JSON; see `strict_json` for what may stand in it.

    Raises
    ------
    TypeError
        Something without a form in JSON; the message says under which key.
    """
    return json.dumps(
        strict_json(value), indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii, allow_nan=False
    )


def strict_json(value: Any, key: str = "") -> Any:
    """Return a value as strings, numbers, lists and dictionaries that JSON knows, at any depth.

    Sets become sorted lists, NumPy's values Python's, paths their text, enumerations what they stand for. Numbers that
    JSON does not know, NaN and infinity, become None.

    Parameters
    ----------
    value : object
        What is to be written.
    key : str
        Where it stands, for the error.

    Raises
    ------
    TypeError
        Anything else, such as a tensor or an object; keys that are neither text nor whole numbers; two keys that are
        one in JSON; a set whose members have no order.
    """
    if isinstance(value, Enum):
        value = value.value
    if _is_of_numpy(value):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return _object(value, key)
    if isinstance(value, list | tuple):
        return [strict_json(inner, f"{key}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, AbstractSet):
        members = [strict_json(inner, key) for inner in value]
        try:
            return sorted(members)
        except TypeError:
            raise TypeError(f"{_place(key)} is a set whose members have no order, and cannot be written") from None
    raise TypeError(f"{_place(key)} is of type {type(value).__name__}, which has no form in JSON")


def _object(value: Mapping[Any, Any], key: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, inner in value.items():
        plain = strict_json(name) if isinstance(name, Enum) or _is_of_numpy(name) else name
        if not isinstance(plain, str | int):
            raise TypeError(f"{_place(key)} has the key {name!r}, of type {type(name).__name__}; JSON's keys are text")
        if str(plain) in found:
            raise TypeError(f"{_place(key)} has two keys that JSON writes as '{plain}'")
        found[str(plain)] = strict_json(inner, f"{key}.{plain}" if key else str(plain))
    return found


def _is_of_numpy(value: Any) -> bool:
    """Tell NumPy's numbers and arrays by their type's home: what only reports a run need not load NumPy."""
    return type(value).__module__ == "numpy" and hasattr(value, "tolist")


def _place(key: str) -> str:
    return f"'{key}'" if key else "what is to be written"
