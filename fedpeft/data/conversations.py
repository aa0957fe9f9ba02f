"""Rows for language models in one form, whatever their layout: turns as JSON, or a raw text."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpeft.config import DataConfig
from fedpeft.data.columns import Column
from fedpeft.data.formats import first_rows
from fedpeft.data.formats.cells import blank, plain_text, stored
from fedpeft.data.formats.text_files import CHUNK_ROWS
from fedpeft.data.layouts import (
    FILL,
    LAYOUTS,
    LOOKED_AT,
    Chosen,
    Layout,
    UnfitRowError,
    candidates,
    described,
    detect,
    names_of,
)
from fedpeft.errors import DataError
from fedpeft.places import Place, named, refuse_missing


@dataclass(frozen=True)
class Reading:
    """How rows were read.

    Parameters
    ----------
    layout : str, optional
        Name of the layout; None where rows have none.
    columns : tuple of str
        The columns that it took.
    dropped : int
        Rows of which turns behind the last answer were left out.
    detected : bool
        Whether the configuration names none of the columns.
    """

    layout: str | None = None
    columns: tuple[str, ...] = ()
    dropped: int = 0
    detected: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "columns": list(self.columns)}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Reading:
        """Read what `to_json` returned."""
        return cls(**{**held, "columns": tuple(held["columns"])})

    def notes(self, place: Place) -> tuple[str, ...]:
        """Say in one line each how the rows of a place were read."""
        if self.layout is None or not self.detected:
            return ()
        return (f"rows of {place} are read as data.layout = '{self.layout}' ({', '.join(self.columns)})",)

    def cautions(self, place: Place, count: int) -> tuple[str, ...]:
        """Say in one line each what of the rows of a place, `count` of them, was left out."""
        if not self.dropped:
            return ()
        return (
            f"of {count:,} rows of {place} {self.dropped:,} end with a turn that is not the assistant's: what "
            "comes after the last answer teaches nothing, and is left out",
        )


def chosen(place: Place, data: DataConfig, columns: Sequence[Column]) -> Chosen | None:
    """Return the layout of a place's rows; None for a task that reads no conversations.

    Parameters
    ----------
    place : Place
        Where the rows lie.
    data : DataConfig
        May name the layout, or its columns.
    columns : sequence of Column
        What the task reads.

    Raises
    ------
    DataError
        The first rows are of no layout.
    ConfigError
        The configuration names columns of different layouts, or an unknown layout.
    """
    if not any(column.kind == "conversation" for column in columns):
        return None
    names = names_of(data)
    among = candidates(names, data.layout)
    if len(among) == 1 and all(key in names or len(usual) == 1 for key, usual in among[0].columns.items()):
        return Chosen(among[0], among[0].called(names, ()))
    written = None if place.path is None else place.path.stat()
    stamp = None if written is None else (written.st_mtime_ns, written.st_size)
    return _detected(place, tuple(names.items()), data.layout, data.encoding, stamp)


@lru_cache(maxsize=64)
def _detected(
    place: Place, names: tuple[tuple[str, str], ...], forced: str | None, encoding: str, stamp: object
) -> Chosen:
    """Detect a layout once for a file as it stands: rows that are read one by one ask for each."""
    given = dict(names)
    among = candidates(given, forced)
    rows = first_rows(place, encoding, LOOKED_AT)
    there = list(dict.fromkeys(column for row in rows for column in row))
    layout = among[0] if len(among) == 1 else detect(rows, given, among)
    if layout is None and rows and not given:
        raise DataError(
            f"the rows of {place} are of no layout that is read. They have: {named(there)}. Layouts are {described()}. "
            "Name the columns by data.messages, or data.prompt and data.completion, or data.text."
        )
    layout = layout or among[0]  # reading says what is wrong
    return Chosen(layout, layout.called(given, there))


def normalised(
    place: Place, choice: Chosen, table: pa.Table, *, skips: bool = False
) -> tuple[str, pa.ChunkedArray, NDArray[np.bool_] | None, Reading]:
    """Return the name of the column that rows become, its cells, which rows stay, and how they were read.

    Parameters
    ----------
    place : Place
        Where the rows lie, for messages.
    choice : Chosen
        Their layout.
    table : pyarrow.Table
        Its columns, as read.
    skips : bool
        Leave out rows in which there is nothing to learn, rather than refuse them.

    Returns
    -------
    str
        ``conversation`` or ``text``.
    pyarrow.ChunkedArray
        Texts, shape ``(n,)``: JSON of ``{"messages": [{"role", "content", ...}], "completion": k}``, or raw.
    array of bool, shape (n,), or None
        Which rows stay; all if None.
    Reading
        How they were read.

    Raises
    ------
    DataError
        Naming the first row of which nothing can be made, and its column.
    """
    layout = choice.layout
    there = {key: column for key, column in choice.columns.items() if column in table.column_names}
    cells = {key: _cells(place, layout, key, column, table[column]) for key, column in there.items()}
    empty = np.zeros(len(table), dtype=np.bool_)
    for key in layout.required:
        missing = _missing(cells[key])
        if skips and key in layout.taught:
            empty |= missing
        else:
            what = "no messages" if key == "messages" else "no text"
            advice = FILL if key in layout.taught else "Fill it in or remove the row."
            refuse_missing(place, there[key], missing, what, advice)
    if layout.conversation is None:
        ((key, column),) = there.items()
        return "text", cells[key], ~empty if empty.any() else None, Reading(layout.name, (column,))
    texts: list[pa.Array] = []
    dropped = 0
    for start in range(0, len(table), CHUNK_ROWS):
        chunk = {key: column.slice(start, CHUNK_ROWS).to_pylist() for key, column in cells.items()}
        done = list(_conversations(place, choice, chunk, start, empty if skips else None))
        texts.append(pa.array([text for text, _ in done], pa.large_string()))
        dropped += sum(number > 0 for _, number in done)
    reading = Reading(layout.name, tuple(there.values()), dropped)
    return "conversation", pa.chunked_array(texts, pa.large_string()), ~empty if empty.any() else None, reading


def _cells(place: Place, layout: Layout, key: str, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column's cells as lists, objects or texts."""
    cells = stored(place, column, cells)
    return cells if pa.types.is_nested(cells.type) and key in layout.nested else plain_text(place, column, cells)


def _missing(cells: pa.ChunkedArray) -> NDArray[np.bool_]:
    return cells.is_null().to_numpy() if pa.types.is_nested(cells.type) else blank(cells)


def _conversations(
    place: Place,
    choice: Chosen,
    cells: Mapping[str, Sequence[object]],
    start: int,
    empty: NDArray[np.bool_] | None,
) -> Iterator[tuple[str | None, int]]:
    """Yield rows as JSON, and the number of turns that each lost; none of those that are `empty`, which it marks."""
    make = choice.layout.conversation
    assert make is not None
    for at, row in enumerate(zip(*cells.values(), strict=True), start):
        if empty is not None and empty[at]:
            yield None, 0
            continue
        try:
            made = make(dict(zip(cells, row, strict=True)))
            text = json.dumps({"messages": _plain(made.messages), "completion": made.completion}, ensure_ascii=False)
        except UnfitRowError as error:
            if empty is not None and error.empty:
                empty[at] = True
                yield None, 0
                continue
            where = f"column '{choice.columns[error.key]}'"
            raise DataError(f"{place.row(at + 1)} {error.what} in {where}. {error.advice}") from None
        except TypeError:
            where = f"column '{next(iter(choice.columns.values()))}'"
            raise DataError(f"{place.row(at + 1)} holds bytes beside a turn in {where}. Leave them out.") from None
        yield text, made.dropped


def _plain(value: object) -> object:
    """Return a value with texts in place of what JSON has no word for, but which texts can say."""
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return value


def made_up(asked: Sequence[str], told: Sequence[str], *, layout: str | None) -> dict[str, list[str]]:
    """Return the column that rows of nobody's would be read as.

    Parameters
    ----------
    asked, told : sequence of str
        What the user and what the assistant says in each.
    layout : str, optional
        That of the run's rows, where it is named.
    """
    if layout is not None and LAYOUTS.find(layout).conversation is None:
        return {"text": [f"{one} {other}" for one, other in zip(asked, told, strict=True)]}
    turns = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one, other in zip(asked, told, strict=True)
    ]
    return {"conversation": [json.dumps({"messages": each, "completion": 1}, ensure_ascii=False) for each in turns]}
