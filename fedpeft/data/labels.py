"""Label names and ids, whatever type a source gives its labels."""

from __future__ import annotations

import decimal
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fedpeft.data.formats.cells import text_or_number
from fedpeft.errors import DataError
from fedpeft.places import Place, refuse_missing

SHOWN = 10  # labels that a message lists
BOOLEANS = frozenset({"true", "false"})


def label_name(value: object) -> str:
    """Return a label's name: 3, 3.0, "3.0" and b"3" are all "3"; "" stands for a missing one.

    Letters with accents have one form, however they were typed: files from a Mac write them in two characters.
    """
    if value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value)):
        return ""
    if isinstance(value, float | decimal.Decimal):
        if math.isfinite(value) and value == int(value):
            return str(int(value))
        if isinstance(value, decimal.Decimal):
            value = value.normalize()
    name = re.sub(r"^([+-]?\d+)\.0+$", r"\1", unicodedata.normalize("NFC", str(value).strip()))
    return "0" if name in ("-0", "+0") else name


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
    encoded = pc.dictionary_encode(text_or_number(place, column, cells)).unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    values = [label_name(value) for value in encoded.dictionary.to_pylist()]
    names = label_order({name for name in values if name})
    ids = {name: index for index, name in enumerate(names)} | {"": -1}
    of_value = np.array([*(ids[name] for name in values), -1], dtype=np.int64)  # the last is for null
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
        A row has no label or one that is not in `labels`; or, these not being given, all rows have the same, or labels
        are real numbers.
    """
    codes, names = column_codes(place, column, cells, feature)
    if (codes < 0).all() and len(codes) > 1:
        raise _unlabelled(place, column, len(codes))
    refuse_missing(place, column, codes < 0, "no label")
    present = np.unique(codes)
    if labels is None:
        present_names = [names[code] for code in present]
        if len(present_names) < 2:
            raise DataError(
                f"every row of {place} has the label '{_shown(present_names)}' in column '{column}'. "
                "Add rows of another label, or name all labels in data.labels."
            )
        _refuse_unclear(place, column, present_names)
        return codes, names
    ids = _ids(labels)
    for code in present:
        if _key(names[code], ids) not in ids:
            row = int((codes == code).argmax()) + 1
            raise DataError(
                f"{place.row(row)} has the label '{_shown([names[code]])}', which is none of the {len(labels)} "
                f"that data.labels, or else the training rows, have: {_shown(labels)}. Remove it, or name all labels "
                "in data.labels."
            )
    return np.array([ids.get(_key(name, ids), -1) for name in names], dtype=np.int64)[codes], labels


def _ids(labels: Sequence[str]) -> dict[str, int]:
    """Return the id of each name; and of true and false however they are written, if they are labels once."""
    ids = {label_name(label): index for index, label in enumerate(labels)}
    if len(ids) < len(labels):
        raise DataError(f"data.labels names one label in two ways, as 1 and 1.0: {_shown(labels)}. Name each once.")
    folded = [name.casefold() for name in ids if name.casefold() in BOOLEANS]
    if len(set(folded)) == len(folded):
        ids |= {name.casefold(): index for name, index in list(ids.items()) if name.casefold() in BOOLEANS}
    return ids


def _key(name: str, ids: dict[str, int]) -> str:
    return name if name in ids or name.casefold() not in BOOLEANS else name.casefold()


def _refuse_unclear(place: Place, column: str, names: Sequence[str]) -> None:
    """Refuse labels that are measurements, or truths in two spellings."""
    folded = [name.casefold() for name in names if name.casefold() in BOOLEANS]
    numbers = set(names) - {name for name in names if name.casefold() in BOOLEANS}
    if len(set(folded)) < len(folded) or (folded and numbers and numbers <= {"0", "1"}):
        raise DataError(
            f"the labels in column '{column}' of {place} write truths in several ways: {_shown(names)}. Choose one."
        )
    try:
        values = [
            float(re.sub(r"^([+-]?\d+),(\d+)$", r"\1.\2", name)) for name in names
        ]  # half of the world writes 0,5
    except ValueError:
        return
    if not all(value.is_integer() for value in values):
        raise DataError(
            f"the labels in column '{column}' of {place} are {len(values)} real numbers ({_shown(names)}): that is "
            "regression, and what is trained here are classifiers. Put them into classes, such as low and high, in a "
            "column of their own; or, if each number is a class, name all of them in data.labels."
        )


def _unlabelled(place: Place, column: str, count: int) -> DataError:
    """Say where labelled rows are, as benchmarks keep the labels of their test split to themselves."""
    advice = "Fill them in, or give other rows."
    if place.others:
        advice = f"For test rows that have them set data.test={' or data.test='.join(place.others)}."
    elif place.part is not None:
        advice = "Give other test rows in data.test, or name the training rows alone to hold some out: " + (
            f"data.source={place.name}:train."
        )
    return DataError(f"none of the {count} rows of {place} has a label in column '{column}'. {advice}")


def _shown(names: Sequence[str]) -> str:
    short = [name if len(name) <= 60 else f"{name[:57]}..." for name in names[:SHOWN]]
    return ", ".join(short) + (", ..." if len(names) > SHOWN else "")
