"""Rows as the rest of the package wants them: normalised columns, label ids, and a training and a test part."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fedpeft.config import DataConfig
from fedpeft.data.columns import Column
from fedpeft.data.conversations import Reading, chosen, normalised
from fedpeft.data.formats import FORMATS
from fedpeft.data.formats.cells import filled_text, is_text, not_read, stored, text_or_number
from fedpeft.data.labels import column_codes, label_ids
from fedpeft.data.layouts import Chosen, names_of
from fedpeft.data.locations import Location as Location
from fedpeft.data.locations import locate as locate
from fedpeft.data.locations import places as places
from fedpeft.data.locations import test_place as test_place
from fedpeft.data.readers import read
from fedpeft.errors import DataError
from fedpeft.places import Place, Wanted, files_in, refuse_missing, unreadable
from fedpeft.seeds import generator


@dataclass(frozen=True)
class Table:
    """The normalised rows of one place.

    Parameters
    ----------
    rows : datasets.Dataset
        Columns ``text`` and ``text_pair``, or ``image``; for language models ``conversation``, turns as JSON, or
        ``text``, see `fedpeft.data.conversations.normalised`; ``label``, an id; ``domain`` and ``client``, text, where
        they are configured and there; ``row``, the row's number in its source, from 1.
    labels : tuple of str
        Names in the order of their ids; empty for causal language modelling.
    place : Place
        Where they lie, for messages.
    skipped : tuple of int
        Numbers of rows that were left out, since there is nothing in them to learn.
    reading : Reading
        How rows for language models were read.
    """

    rows: datasets.Dataset
    labels: tuple[str, ...]
    place: Place
    skipped: tuple[int, ...] = ()
    reading: Reading = field(default_factory=Reading)


def hold_out(
    labels: NDArray[np.int64] | None, count: int, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose which rows to keep for training and which to hold out, the same share of each label.

    Parameters
    ----------
    labels : array of int64, shape (n,), optional
        Label ids; None where rows have none.
    count : int
        Number n of rows.
    fraction : float
        Share to hold out; rounded for each label, and never all of its rows.
    seed : int
        The run's seed.

    Returns
    -------
    tuple of array of int64
        Kept and held-out rows, each ascending.

    Raises
    ------
    DataError
        There are too few rows to hold one out.
    """
    order = generator(seed, "test-split").permutation(count)
    groups = [order] if labels is None else [order[labels[order] == label] for label in np.unique(labels)]
    sizes = [min(int(fraction * len(group) + 0.5), len(group) - 1) for group in groups]
    largest = max(range(len(groups)), key=lambda index: len(groups[index]))
    if sum(sizes) == 0 and len(groups[largest]) > 1:
        sizes[largest] = 1
    held = np.sort(np.concatenate([group[:size] for group, size in zip(groups, sizes, strict=True)]))
    if len(held) == 0:
        raise DataError(f"{count} rows are too few to hold out test rows. Give data.test, or more rows of each label.")
    return np.setdiff1d(np.arange(count), held), held.astype(np.int64)


CLIENT = frozenset({"partition.by"})
DOMAIN = frozenset({"data.domain"})


def wanted_columns(
    data: DataConfig,
    columns: Sequence[Column],
    client_column: str | None,
    optional: frozenset[str] = frozenset(),
    *,
    tolerant: bool = False,
    layout: Chosen | None = None,
) -> Wanted:
    """Return what these columns are called in the rows, and those of domain and client, by the configuration's keys.

    Columns of conversations are those of a layout, which `fedpeft.data.conversations.chosen` finds in the rows.
    """
    called = {f"data.{column.name}": column.named(data) for column in columns if column.kind != "conversation"}
    nested: frozenset[str] = frozenset()
    if layout is not None:
        called |= {f"data.{key}": name for key, name in layout.columns.items()}
        optional |= {f"data.{key}" for key in layout.layout.optional}
        nested = frozenset(f"data.{key}" for key in layout.layout.nested)
    called |= {"data.domain": data.domain, "partition.by": client_column}
    named = {key: name for key, name in called.items() if name is not None}
    return Wanted(named, optional, data.encoding, tolerant, nested)


def raw_rows(place: Place, data: DataConfig, columns: Sequence[Column], optional: frozenset[str]) -> datasets.Dataset:
    """Read the columns of one place as they are; a row that cannot be read is one of empty cells."""
    layout = chosen(place, data, columns)
    return read(place, wanted_columns(data, columns, None, optional, tolerant=True, layout=layout))


def read_rows(
    place: Place,
    data: DataConfig,
    columns: Sequence[Column],
    *,
    labels: tuple[str, ...] | None,
    client_column: str | None = None,
    optional: frozenset[str] = frozenset(),
    only: Sequence[int] | None = None,
    raw: datasets.Dataset | None = None,
) -> Table:
    """Read the rows of one place and normalise their columns.

    Parameters
    ----------
    place : Place
        Where they lie.
    data : DataConfig
        Names them.
    columns : sequence of Column
        What is read.
    labels : tuple of str, optional
        Names of all labels in the order of their ids; if None, those of the rows: in their own order where the column
        knows one, else by value where all are numbers, else alphabetically.
    client_column : str, optional
        Column whose values name the clients.
    optional : frozenset of str
        Configuration keys whose column may be missing.
    only : sequence of int, optional
        Which rows to take, from 0; all if not given.
    raw : datasets.Dataset, optional
        The place's rows where they have been read.

    Raises
    ------
    DataError
        A column is missing; a row has no text, label, domain or client, or a label that is not in `labels`; or there is
        but one label.
    """
    layout = chosen(place, data, columns)
    wanted = wanted_columns(data, columns, client_column, optional, layout=layout)
    raw = read(place, wanted) if raw is None else raw
    numbers = np.arange(1, len(raw) + 1)
    if only is not None:
        raw, numbers = raw.select(only), np.asarray(only, dtype=np.int64) + 1
    elif (begun := FORMATS.find(place.kind).begun) is not None:
        place = replace(place, files=begun(place, raw))
    kinds = {each.name: each.kind for each in columns if each.kind != "conversation"}
    cells, features, names = _normalised(place, wanted, kinds, raw, labels)
    reading, kept = Reading(), None
    if layout is not None:
        table = raw.with_format("arrow")[:]
        column, cells[column], kept, reading = normalised(place, layout, table, skips=data.empty == "skip")
        reading = replace(reading, detected=not names_of(data))
        features[column] = datasets.Value("large_string")
    cells["row"], features["row"] = numbers, datasets.Value("int64")
    rows, skipped = _kept(pa.table(cells), numbers, kept)
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return Table(datasets.Dataset(rows, info=info), names, place, skipped, reading)


def _kept(
    rows: pa.Table, numbers: NDArray[np.int64], kept: NDArray[np.bool_] | None
) -> tuple[pa.Table, tuple[int, ...]]:
    """Return the rows that stay, and the numbers of the others."""
    return (rows, ()) if kept is None else (rows.filter(pa.array(kept)), tuple(numbers[~kept].tolist()))


def _normalised(
    place: Place, wanted: Wanted, kinds: Mapping[str, str], raw: datasets.Dataset, labels: tuple[str, ...] | None
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Return cells and types of the wanted columns but those of conversations, and the names of the labels."""
    table: pa.Table = raw.with_format("arrow")[:]
    cells: dict[str, Any] = {}
    features: dict[str, Any] = {}
    names: tuple[str, ...] = ()
    for key, column in wanted.columns.items():
        role = "client" if key == "partition.by" else key.removeprefix("data.")
        if column not in raw.column_names:
            continue
        if kinds.get(role) == "label":
            cells[role], names = label_ids(place, column, table[column], raw.features[column], labels)
            features[role] = datasets.Value("int64")
        elif role in kinds:
            normalised, features[role] = NORMALISED[kinds[role]]
            cells[role] = normalised(place, column, table[column])
        elif role in ("domain", "client"):
            cells[role] = _names(place, column, table[column], raw.features[column])
            features[role] = datasets.Value("large_string")
    return cells, features, names


def _names(place: Place, column: str, cells: pa.ChunkedArray, feature: Any) -> pa.Array:
    codes, values = column_codes(place, column, cells, feature)
    refuse_missing(place, column, codes < 0, "no value")
    return pa.array(values, pa.large_string()).take(pa.array(codes))


def _numbers(place: Place, column: str, cells: pa.ChunkedArray) -> NDArray[np.float64]:
    try:
        values = pc.cast(text_or_number(place, column, cells), pa.float64()).to_numpy()
    except pa.ArrowException:
        raise not_read(place, column, cells.type, "numbers") from None
    refuse_missing(place, column, ~np.isfinite(values), "no finite number")
    return values  # type: ignore[no-any-return]


def _images(place: Place, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    cells = stored(place, column, cells)
    if is_text(cells.type):
        cells = text_or_number(place, column, cells)
    missing = pc.is_null(cells).to_numpy()
    if is_text(cells.type):
        missing |= pc.fill_null(pc.equal(cells, ""), True).to_numpy()
        refuse_missing(place, column, missing, "no image")
        paths = _resolved(place, cells.to_pylist())
        for row, path in enumerate(paths, start=1):
            if not os.path.isfile(path):
                raise DataError(f"{place.row(row)} names the image '{path}', which is not a file. Correct the path.")
        cells = pa.chunked_array([pa.array([str(path) for path in paths], pa.string())])
    refuse_missing(place, column, missing, "no image")
    try:
        return pa.chunked_array([datasets.Image().cast_storage(chunk) for chunk in cells.chunks])
    except (TypeError, ValueError, pa.ArrowException):
        raise DataError(
            f"column '{column}' of {place} holds {cells.type}. Name a column of images, their bytes or their paths."
        ) from None


# a column's cells by its kind, and their type; those of labels need the names too
NORMALISED: dict[str, tuple[Callable[[Place, str, pa.ChunkedArray], Any], Any]] = {
    "number": (_numbers, datasets.Value("float64")),
    "image": (_images, datasets.Image()),
    "text": (filled_text, datasets.Value("large_string")),
}


def _resolved(place: Place, paths: Iterable[str]) -> list[Path]:
    """Read paths as relative to the folder that the rows lie in."""
    if place.path is None:
        return [Path(path) for path in paths]
    base = (place.path if place.path.is_dir() else place.path.parent).resolve()
    return [base / path for path in paths]


def linked_files(place: Place, data: DataConfig, columns: Sequence[Column]) -> list[Path]:
    """Return the image files that rows name by their paths, for rows whose images lie elsewhere."""
    column = next((each.named(data) for each in columns if each.kind == "image"), None)
    if column is None or not FORMATS.find(place.kind).may_link(place, column):
        return []
    wanted = Wanted({"data.image": column}, encoding=data.encoding, tolerant=True)
    cells = read(place, wanted).with_format("arrow")[:][column]
    if not is_text(cells.type):
        return []
    paths = _resolved(place, [path for path in text_or_number(place, column, cells).to_pylist() if path])
    return [path for path in paths if os.path.isfile(path)]  # reading the rows says which are missing


def digest(place: Place, data: DataConfig, columns: Sequence[Column] = ()) -> str:
    """Return the SHA-256 of everything that the rows of a place are made of, without reading them as rows.

    Where one of the columns to be read is of images, this includes the files that it names; where one is of
    conversations, what the configuration says of their layout.

    Raises
    ------
    DataError
        A file cannot be read.
    """
    said = {}
    if any(column.kind == "conversation" for column in columns):
        said = names_of(data) | ({} if data.layout is None else {"layout": data.layout})
    format_ = FORMATS.find(place.kind)
    if format_.fingerprint is not None:
        whole = format_.fingerprint(place)
        return hashlib.sha256(repr((whole, sorted(said.items()))).encode()).hexdigest() if said else whole
    assert place.path is not None
    files = [place.path]
    if format_.files is not None:
        files = format_.files(place)
    elif place.path.is_dir():
        files = sorted(path for path in files_in(place.path) if path.is_file())
    total = hashlib.sha256(repr(sorted(said.items())).encode() if said else b"")
    for path in [*files, *linked_files(place, data, columns)]:
        named = str(path.relative_to(place.path)) if place.path.is_dir() and path.is_relative_to(place.path) else ""
        try:
            with path.open("rb") as file:
                total.update(
                    f"{named}\x1f{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode(errors="surrogateescape")
                )
        except OSError as error:
            raise unreadable(f"'{path}'", error) from None
    return total.hexdigest()
