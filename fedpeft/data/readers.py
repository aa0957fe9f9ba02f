"""Reading one table of rows, keeping only the columns asked for.

CSV and JSON are parsed here, all cells as text, because type guessing would turn texts such as ``007`` or
``2020-01-01`` into numbers and dates. Everything else is read by the `datasets` library.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets

from fedpeft.data.formats import FORMATS
from fedpeft.data.formats.hub import quiet
from fedpeft.errors import DataError
from fedpeft.places import Place, Wanted

__all__ = ["Place", "Wanted", "cautions", "notes", "plain_batches", "read"]


def read(place: Place, wanted: Wanted) -> datasets.Dataset:
    """Read the wanted columns of one table.

    Returns
    -------
    datasets.Dataset
        Cells of CSV, JSON and image folders are text; other sources keep their types.

    Raises
    ------
    DataError
        The source cannot be read, is malformed, has no rows or lacks a wanted column.
    """
    with quiet():
        rows = FORMATS.find(place.kind).read(place, wanted)
    if len(rows) == 0:
        raise DataError(f"{place} holds no rows. Give a source with at least one.")
    return rows


def plain_batches(rows: datasets.Dataset, size: int) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of up to `size` rows at a time as Python values; images as their bytes or path."""
    for batch in rows.with_format("arrow")[:].to_batches(max_chunksize=size):
        yield batch.to_pydict()


def notes(place: Place) -> tuple[str, ...]:
    """Say in one line each what the rows of a place are."""
    return FORMATS.find(place.kind).notes(place)


def cautions(place: Place) -> tuple[str, ...]:
    """Say in one line each what in a place is no row, though it might be taken for one."""
    return FORMATS.find(place.kind).cautions(place)
