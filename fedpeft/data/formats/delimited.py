"""Tables with a separator: CSV and its relations, all cells as text."""

from __future__ import annotations

import contextlib
import csv
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft.data.formats.record import Format
from fedpeft.data.formats.text_files import opened, refuse_nul, table
from fedpeft.errors import DataError
from fedpeft.places import Place, Wanted

if TYPE_CHECKING:
    import datasets

SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}


def _read(place: Place, wanted: Wanted) -> datasets.Dataset:
    """Read a file whose first line names the columns, by the separator that makes the wanted ones of that line."""
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    begun = 1
    try:
        with opened(place, wanted.encoding, tolerant=wanted.tolerant) as file:
            reader, header = _header(place, wanted, file)
            names = wanted.present(place, header)
            chosen = [header.index(name) for name in names]

            def cells() -> Iterator[Sequence[str | None]]:
                nonlocal begun
                begun = reader.line_num + 1
                for row in _rows(reader, tolerant=wanted.tolerant):
                    if row is None:
                        yield [None] * len(chosen)
                    elif "".join(row).strip() or len(row) > 1:
                        if not wanted.tolerant:
                            _check_row(place, reader, row, header)
                        elif len(row) != len(header) or _is_header(row, header):
                            row = [""] * len(header)
                        yield [row[index] for index in chosen]
                    begun = reader.line_num + 1

            return table(place, cells(), names, tolerant=wanted.tolerant)
    except csv.Error as error:
        raise DataError(
            f"the row that begins in line {begun} of {place} is malformed: {error}. "
            "Close every quote, and double those inside a field."
        ) from None
    finally:
        csv.field_size_limit(limit)


def _rows(reader: Any, *, tolerant: bool) -> Iterator[list[str] | None]:
    """Yield rows; where `tolerant`, None for one that is malformed."""
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            if not tolerant:
                raise
            row = None
        yield row


def _header(place: Place, wanted: Wanted, file: Any) -> tuple[Any, list[str]]:
    """Return the reader past the header, and the header's names."""
    assert place.path is not None
    tabs_first = ".tsv" in [suffix.lower() for suffix in place.path.suffixes[-2:]]
    order = sorted(SEPARATORS, key=lambda mark: mark != "\t") if tabs_first else list(SEPARATORS)
    headers: dict[str, list[str]] = {}
    for mark in order:
        try:
            reader, header = _parsed(file, mark)
        except csv.Error:
            continue  # quotes that only another separator explains
        refuse_nul(place, "".join(header))
        if header and wanted.fit(header):
            return reader, header
        headers[mark] = header
    best = max(headers, key=lambda mark: len(headers[mark]), default=order[0])
    reader, header = _parsed(file, best)
    if not header:
        raise DataError(f"{place} is empty. Its first line must name the columns.")
    return reader, header


def _parsed(file: Any, mark: str) -> tuple[Any, list[str]]:
    """Return a reader at the first line that is not blank, and that line's cells."""
    file.seek(0)
    reader = csv.reader(file, delimiter=mark, strict=True)
    names = ([name.strip() for name in row] for row in reader)
    # Excel may write sep=; into a line of its own
    return reader, next((row for row in names if any(row) and not re.fullmatch("sep=.?", "".join(row))), [])


def _check_row(place: Place, reader: Any, row: Sequence[str], header: Sequence[str]) -> None:
    if len(row) != len(header):
        mark = reader.dialect.delimiter
        fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
        raise DataError(
            f"line {reader.line_num} of {place} has {fields}, but the header has {len(header)} "
            f"(divided by {SEPARATORS[mark]}). Quote fields that hold {SEPARATORS[mark]} or line breaks."
        )
    if _is_header(row, header):
        raise DataError(
            f"line {reader.line_num} of {place} repeats the header, as files put one behind the other do. Remove it."
        )


def _is_header(row: Sequence[str], header: Sequence[str]) -> bool:
    return len(row) > 1 and row[-1].strip() == header[-1] and [cell.strip() for cell in row] == header


def _first(place: Place, encoding: str, count: int) -> list[dict[str, Any]]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with opened(place, encoding, tolerant=True) as file:
            headers: dict[str, list[str]] = {}
            for mark in SEPARATORS:
                with contextlib.suppress(csv.Error):
                    headers[mark] = _parsed(file, mark)[1]
            best = max(headers, key=lambda mark: len(headers[mark]), default=",")
            reader, header = _parsed(file, best)
            rows = itertools.islice((row for row in _rows(reader, tolerant=True) if row), count)
            return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    finally:
        csv.field_size_limit(limit)


CSV = Format("csv", "CSV", _read, suffixes=(".csv", ".tsv"), packed=True, first=_first)
