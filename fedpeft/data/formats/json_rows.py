"""Rows in JSON: an object a line, a list of objects, or one object that holds them; all cells as text."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from fedpeft.data.formats.record import Format
from fedpeft.data.formats.text_files import opened, refuse_nul, table
from fedpeft.errors import DataError
from fedpeft.places import Place, Wanted, named

if TYPE_CHECKING:
    import datasets

KEPT_DEPTH = 8  # rows and their cells lie less deep than this in every layout that is read
LINES = {".jsonl", ".ndjson"}  # suffixes of files with an object a line
ADVICE = "Write one object a line, or a list of objects."


class _Repeated(dict[str, Any]):
    """An object in which keys stand twice.

    Parameters
    ----------
    pairs : list of tuple
        Its keys and values.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.keys_held_twice = {key for key in keys if keys.count(key) > 1}


class _Digits(str):
    """A whole number too long for Python to make a number of."""

    __slots__ = ()


def _read(place: Place, wanted: Wanted) -> datasets.Dataset:
    """Read an object a line; or, where the file is one JSON value, its rows."""
    seen: dict[str, None] = {}
    columns = list(dict.fromkeys(wanted.columns.values()))

    nested = wanted.nested_columns

    def row(number: int, where: str, record: object) -> list[str | None]:
        if isinstance(record, list) and len(nested) == 1:
            record = dict.fromkeys(nested, record)
        if not isinstance(record, dict):
            raise DataError(f"{where} of {place} is not a JSON object. {ADVICE}")
        for column in columns:
            if isinstance(record, _Repeated) and column in record.keys_held_twice:
                raise DataError(f"{where} of {place} has the key '{column}' twice. Rename or remove one.")
        seen.update(dict.fromkeys(record))
        return [_text(place, number, column, record.get(column), nested=column in nested) for column in columns]

    def cells() -> Iterator[list[str | None]]:
        for number, (where, record) in enumerate(_records(place, wanted), start=1):
            try:
                read = row(number, where, record)
            except DataError:
                if not wanted.tolerant:
                    raise
                read = [None] * len(columns)
            yield read

    rows = table(place, cells(), columns, tolerant=wanted.tolerant)
    if len(rows) == 0:
        raise DataError(f"{place} holds no rows. Write one JSON object a line.")
    return rows.select_columns(wanted.present(place, list(seen)))


def _records(place: Place, wanted: Wanted) -> Iterator[tuple[str, object]]:
    with opened(place, wanted.encoding, tolerant=wanted.tolerant) as file:
        first = next((line for line in file if line.strip()), "")
        refuse_nul(place, first)
        file.seek(0)
        named = wanted.tolerant and place.path is not None and not LINES.isdisjoint(place.path.suffixes)
        if named or _is_whole(first):
            lines = _lines(place, file, tolerant=wanted.tolerant)
            # a line alone may be an object that holds the rows
            start = list(itertools.islice(lines, 2))
            if len(start) > 1 or not start:
                yield from itertools.chain(start, lines)
                return
            values = [value for _, value in start]
        else:
            values = list(_values(place, file.read()))
    if len(values) == 1:
        yield from _rows_within(place, wanted, values[0])
    else:
        yield from ((f"row {number}", value) for number, value in enumerate(values, start=1))


def _is_whole(line: str) -> bool:
    """Say whether a line is JSON in itself, and not the beginning of a value over several lines."""
    if line.lstrip().startswith("["):
        return False
    try:
        _parse(line)
    except json.JSONDecodeError:
        # an object that is closed on its line is one a line, only damaged
        return line.rstrip().endswith("}")
    return True


def _lines(place: Place, file: TextIO, *, tolerant: bool) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                value = _parse(line)
            except json.JSONDecodeError as error:
                if not tolerant:
                    raise _invalid(place, error, number) from None
                value = None
            yield f"line {number}", value


def _values(place: Place, text: str) -> Iterator[object]:
    """Yield the values that stand one after the other in a text."""
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            value, at = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _invalid(place, error, error.lineno) from None
        except RecursionError:
            text, at = _flat(text[at:]), 0
            continue
        yield value


def _rows_within(place: Place, wanted: Wanted, value: object) -> Iterable[tuple[str, object]]:
    """Return the rows of a file's only value: itself, its items, those of its one list, or its columns' cells."""
    if isinstance(value, list):
        if len(wanted.nested_columns) == 1 and _are_turns(value):
            return [("row 1", value)]
        return ((f"row {number}", row) for number, row in enumerate(value, start=1))
    cells = [value.get(column) for column in wanted.columns.values()] if isinstance(value, dict) else []
    cells = [cell for cell in cells if not _are_turns(cell)]
    if not isinstance(value, dict) or (wanted.fit(list(value)) and not any(isinstance(c, dict | list) for c in cells)):
        return [("line 1", value)]
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    lists = [key for key in lists if not (wanted.nested and _are_turns(value[key]))]
    if len(lists) > 1:
        raise DataError(
            f"{place} is an object with several lists of rows ({', '.join(lists)}). Save each as a file of its own."
        )
    if lists:
        return ((f"row {number} of '{lists[0]}'", row) for number, row in enumerate(value[lists[0]], start=1))
    names = [name for name in dict.fromkeys(wanted.columns.values()) if name in value]
    # pandas writes a column as an object from index to cell
    columns: list[Any] = [_cells(place, name, value[name], value[names[0]]) for name in names]
    # a file with an object a line may have one line, and then what it lacks is a column
    of_lines = place.path is not None and not LINES.isdisjoint(place.path.suffixes)
    if not names and not of_lines and any(isinstance(c, dict | list) and c not in ([], {}) for c in value.values()):
        raise DataError(f"{place} is one object in which no rows are found (it has: {named(list(value))}). {ADVICE}")
    if not names or not all(isinstance(column, list) for column in columns):
        return [] if list(value.values()) == [[]] else [("line 1", value)]
    return _turned(place, names, columns, value)


def _cells(place: Place, name: str, column: object, first: object) -> object:
    """Return a column's cells in the order of the first column's index, where they are kept by index."""
    if not isinstance(column, dict) or not isinstance(first, dict):
        return column
    if column.keys() != first.keys():
        raise DataError(f"column '{name}' of {place} has another index than the columns before it. Save it anew.")
    return [column[index] for index in first]


def _turned(
    place: Place, names: Sequence[str], columns: Sequence[list[object]], value: Mapping[str, object]
) -> Iterable[tuple[str, object]]:
    """Return rows of columns, and an empty cell for every key that is not read, so that it is known to be there."""
    sizes = {name: len(cells) for name, cells in zip(names, columns, strict=True)}
    if len(set(sizes.values())) > 1:
        lengths = ", ".join(f"'{name}' {size}" for name, size in sizes.items())
        raise DataError(f"the columns of {place} differ in length: {lengths}. Give each as many cells.")
    others = dict.fromkeys(value)
    return (
        (f"row {number}", {**others, **dict(zip(names, cells, strict=True))})
        for number, cells in enumerate(zip(*columns, strict=True), start=1)
    )


def _parse(text: str) -> object:
    try:
        return DECODER.decode(text)
    except RecursionError:
        return DECODER.decode(_flat(text))


def _flat(text: str) -> str:
    """Empty what is nested deeper than any cell: so much of it that Python's parser gives up."""
    kept: list[str] = []
    depth = start = 0
    for match in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', text, re.DOTALL):
        mark = match[0]
        if mark in "[{":
            depth += 1
            if depth == KEPT_DEPTH + 1:
                kept.append(text[start : match.end()])
        elif mark in "]}":
            if depth == KEPT_DEPTH + 1:
                start = match.start()
            depth -= 1
    if depth <= KEPT_DEPTH:  # else it ends before all is closed
        kept.append(text[start:])
    return "".join(kept)


def _invalid(place: Place, error: json.JSONDecodeError, line: int) -> DataError:
    return DataError(
        f"line {line} of {place} is not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}. {ADVICE}"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    return record if len(record) == len(pairs) else _Repeated(pairs)


def _integer(digits: str) -> int | _Digits:
    try:
        return int(digits)
    except ValueError:  # Python refuses thousands of digits
        return _Digits(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _are_turns(value: object) -> bool:
    """Say whether a value is a list of turns, and not one of rows."""
    names = ({"role", "content"}, {"from", "value"})
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and any(n <= set(value[0]) for n in names)
    )


def _text(place: Place, number: int, column: str, value: object, *, nested: bool = False) -> str | None:
    what = type(value).__name__
    if nested and isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, _Digits):
        what = f"number of {len(value.lstrip('-')):,} digits"
    elif value is None or isinstance(value, str):
        return value
    elif isinstance(value, bool | int):
        return str(value)
    elif isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isfinite(value):
            return str(int(value)) if value.is_integer() else repr(value)
        what = "number without bounds (Infinity, or above 1e308)"
    raise DataError(f"row {number} of {place} holds a {what} in column '{column}'. Give a text or a number.")


def _first(place: Place, encoding: str, count: int) -> list[dict[str, Any]]:
    """Return the first rows; those that are lists as objects of which the list is ``messages``."""
    with opened(place, encoding, tolerant=True) as file:
        line = next((line for line in file if line.strip()), "")
        file.seek(0)
        if _is_whole(line):
            values = [value for _, value in itertools.islice(_lines(place, file, tolerant=True), count)]
            if len(values) == 1:
                values = _first_within(values[0], count)
        else:
            values = _first_values(place, file.read(), count)
    rows = [{"messages": value} if isinstance(value, list) else value for value in values[:count]]
    return [row for row in rows if isinstance(row, dict)]


def _first_values(place: Place, text: str, count: int) -> list[object]:
    """Return the first rows of a text that is one JSON value, or several; a long list is not read to its end."""
    text = text.lstrip()
    if not text.startswith("["):
        values = list(itertools.islice(_values(place, text), count))
        return _first_within(values[0], count) if len(values) == 1 else values
    items: list[object] = []
    at = 1
    while len(items) < count and (start := re.compile(r"\s*,?\s*(?=[\[{])").match(text, at)):
        try:
            item, at = DECODER.raw_decode(text, start.end())
        except (json.JSONDecodeError, RecursionError):
            break
        items.append(item)
    return [items] if _are_turns(items) else items


def _first_within(value: object, count: int) -> list[object]:
    """Return the first rows of a file's only value: itself, its items, those of its one list, or its columns' cells."""
    if isinstance(value, list):
        return [value] if _are_turns(value) else value[:count]
    if not isinstance(value, dict):
        return []
    lists = [cells for cells in value.values() if isinstance(cells, list) and cells and isinstance(cells[0], dict)]
    if len(lists) == 1 and not _are_turns(lists[0]):
        return lists[0][:count]
    columns = {key: list(cells.values()) if isinstance(cells, dict) else cells for key, cells in value.items()}
    if columns and all(isinstance(cells, list) and not _are_turns(cells) for cells in columns.values()):
        size = min(count, *(len(cells) for cells in columns.values()))
        return [{key: cells[row] for key, cells in columns.items()} for row in range(size)]
    return [value]


JSON = Format("json", "JSON lines", _read, suffixes=(".json", ".jsonl", ".ndjson"), packed=True, first=_first)
