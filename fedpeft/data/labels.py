"""Label names and ids, whatever type a source gives its labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fedpeft.data.readers import Place, refuse_missing
from fedpeft.errors import DataError


def label_name(value: object) -> str:
    """Return a label's name: 3, 3.0 and "3.0" are all "3"; "" stands for a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", str(value).strip())


def label_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names by value if all are numbers, else alphabetically."""
    ordered = sorted(names)
    try:
        values = {name: float(name) for name in ordered}
    except ValueError:
        return tuple(ordered)
    return tuple(sorted(ordered, key=values.__getitem__) if all(map(math.isfinite, values.values())) else ordered)


def column_codes(
    place: Place, column: str, cells: pa.ChunkedArray, feature: object
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return each row's index into the names of a column's values, -1 where it has none, and these names."""
    if isinstance(feature, datasets.ClassLabel):
        codes = pc.fill_null(cells, -1).to_numpy().astype(np.int64)
        return np.where((codes >= 0) & (codes < len(feature.names)), codes, -1), tuple(feature.names)
    if pa.types.is_nested(cells.type):
        raise DataError(f"column '{column}' of {place} holds {cells.type}. Name a column of texts or numbers.")
    encoded = pc.dictionary_encode(cells).unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    found = [label_name(value) for value in encoded.dictionary.to_pylist()]
    names = label_order({name for name in found if name})
    ids = {name: index for index, name in enumerate(names)} | {"": -1}
    of_value = np.array([*(ids[name] for name in found), -1], dtype=np.int64)  # the last is for null
    return of_value[pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)], names


def label_ids(
    place: Place, column: str, cells: pa.ChunkedArray, feature: object, labels: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return each row's label id, and the label names in the order of their ids.

    Parameters
    ----------
    place : Place
        Where the rows lie, for messages.
    column : str
        The column's name.
    cells : pyarrow.ChunkedArray
        Its cells.
    feature : object
        What the `datasets` library knows of it.
    labels : tuple of str, optional
        All names; if None, those of the column.

    Raises
    ------
    DataError
        A row has no label or one that is not in `labels`; or, these not being given, all rows have the same.
    """
    codes, names = column_codes(place, column, cells, feature)
    refuse_missing(place, column, codes < 0, "no label")
    present = np.unique(codes)
    if labels is None:
        if len(present) < 2:
            raise DataError(
                f"every row of {place} has the label '{names[present[0]]}' in column '{column}'. "
                "Add rows of another label, or name all labels in data.labels."
            )
        return codes, names
    ids = {label_name(label): index for index, label in enumerate(labels)}
    for code in present:
        if names[code] not in ids:
            row = int((codes == code).argmax()) + 1
            shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise DataError(
                f"row {row} of {place} has the label '{names[code]}', which is none of the {len(labels)} that "
                f"data.labels, or else the training rows, have: {shown}. Remove it, or name all labels in data.labels."
            )
    return np.array([ids.get(name, -1) for name in names], dtype=np.int64)[codes], labels
