"""Columns of Arrow in the few types that the rest reads: what was saved as categories, bytes or views is text again."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fedpeft.errors import DataError
from fedpeft.places import Place, refuse_missing


def stored(place: Place, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return cells without what only says how they are stored: dictionaries, views, extension types, runs.

    Raises
    ------
    DataError
        The cells are of a type that is not read.
    """
    kind = cells.type
    try:
        if isinstance(kind, pa.BaseExtensionType):
            return stored(place, column, pa.chunked_array([chunk.storage for chunk in cells.chunks], kind.storage_type))
        if pa.types.is_dictionary(kind):
            return stored(place, column, cells.cast(kind.value_type))
        if pa.types.is_run_end_encoded(kind):
            decoded = [pc.run_end_decode(chunk) for chunk in cells.chunks]
            return stored(place, column, pa.chunked_array(decoded, kind.value_type))
        if pa.types.is_string_view(kind) or pa.types.is_null(kind):
            return cells.cast(pa.large_string())
        if pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
            return cells.cast(pa.large_binary())
        if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
            return cells.cast(pa.decimal128(kind.precision, kind.scale))
    except pa.ArrowException:
        raise not_read(place, column, kind, "texts or numbers") from None
    return cells


def text_or_number(place: Place, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return cells as text, numbers or booleans; bytes, as Spark and Impala write text, are read as UTF-8.

    Raises
    ------
    DataError
        The cells are of another type, or are bytes that are not UTF-8.
    """
    cells = stored(place, column, cells)
    kind = cells.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _decoded(place, column, cells)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if is_text:
        try:
            cells.validate(full=True)
        except pa.ArrowException:  # what wrote the file did not look
            return _decoded(place, column, cells.cast(pa.large_binary()))
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if is_text or is_number or pa.types.is_boolean(kind):
        return cells
    raise not_read(place, column, kind, "texts or numbers")


def filled_text(place: Place, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return cells as text, of which none may be missing or blank.

    Raises
    ------
    DataError
        One is, or they are neither texts nor numbers.
    """
    text = plain_text(place, column, cells)
    refuse_missing(place, column, blank(text), "no text")
    return text


def plain_text(place: Place, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return cells as text, some of which may be missing.

    Raises
    ------
    DataError
        They are neither texts nor numbers.
    """
    cells = text_or_number(place, column, cells)
    if pa.types.is_floating(cells.type):
        cells = pc.if_else(pc.is_nan(cells), None, cells)  # pandas' word for a missing cell
    return cells.cast(pa.large_string())


def blank(text: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Say which texts are missing or blank, shape ``(n,)``."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(text), ""), True).to_numpy()  # type: ignore[no-any-return]


def not_read(place: Place, column: str, kind: pa.DataType, what: str) -> DataError:
    """Return the error for a column of a type that is of no use."""
    named = " ".join(str(kind).split())
    short = named if len(named) < 80 else f"{named[:77]}..."
    return DataError(f"column '{column}' of {place} holds {short}. Name a column of {what}.")


def _decoded(place: Place, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return cells.cast(pa.large_string())
    except pa.ArrowException:
        pass
    for row, value in enumerate((cell.as_py() for chunk in cells.chunks for cell in chunk), start=1):
        try:
            _ = value is None or value.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place.row(row)} holds bytes in column '{column}' that are not UTF-8 text "
                f"(0x{value[error.start]:02x} at {error.start}). Save the column as text."
            ) from None
    raise not_read(place, column, cells.type, "texts or numbers")


def is_text(kind: pa.DataType) -> bool:
    """Say whether cells of this type are texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
