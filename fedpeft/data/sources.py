"""Rows as the rest of the package wants them: normalised columns, label ids, and a training and a test part."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedpeft.config import DataConfig, Task
from fedpeft.data.labels import column_codes, label_ids
from fedpeft.data.readers import Kind, Place, Wanted, class_folders, hub_dataset, read, refuse_missing, unreadable
from fedpeft.errors import DataError
from fedpeft.seeds import generator

KIND_BY_SUFFIX: Mapping[str, Kind] = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
KINDS = (
    "a CSV, JSON lines or Parquet file, a folder of such files named train and test, a folder of images in one "
    "sub-folder per class, a folder written by save_to_disk, or a dataset of the hub"
)
TEST_PARTS = ("test", "validation")
HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"
FILE_SUFFIX = r"\.[A-Za-z]+$"  # not .v2, which ids end with


@dataclass(frozen=True)
class Location:
    """A source that exists.

    Parameters
    ----------
    train : Place
        Its training rows, or all rows of a source that is not divided.
    test : Place, optional
        Its own test rows.
    """

    train: Place
    test: Place | None = None


@dataclass(frozen=True)
class SourceRows:
    """Training and test rows.

    Parameters
    ----------
    train, test : datasets.Dataset
        Columns ``text`` and ``text_pair``, or ``image``, or ``prompt`` and ``completion``; ``label``, an id; ``domain``
        and ``client``, text, where they are configured and there; ``row``, the row's number in its source, from 1.
    labels : tuple of str
        Names in the order of their ids; empty for causal language modelling.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The normalised rows of one place; see `SourceRows`."""

    rows: datasets.Dataset
    labels: tuple[str, ...]


def locate(source: str | Path | None) -> Location:
    """Find a source by its path, or failing that by its id on the hub.

    Only a plain ``name`` or ``owner/name`` without a file suffix can be a hub id, so that a mistyped path is never
    asked for on the network.

    Raises
    ------
    DataError
        There is no such file or folder, it is of none of the kinds read here, or the hub does not have it.
    """
    if source is None:
        raise DataError(f"no rows are named. Give data.source: {KINDS}.")
    name, path = str(source), Path(source).expanduser()
    try:
        if path.is_file():
            return Location(_file(name, path))
        if path.is_dir():
            return _folder(name, path)
    except OSError as error:
        raise unreadable(f"'{name}'", error) from None
    if isinstance(source, Path) or not re.fullmatch(HUB_ID, name) or re.search(FILE_SUFFIX, name):
        raise DataError(f"there is no file or folder '{name}'. Give the path of {KINDS}.")
    parts = hub_dataset(name)
    return _divided({part: Place(name, "hub", None, part) for part in parts}, name)


def _file(name: str, path: Path) -> Place:
    kind = KIND_BY_SUFFIX.get(path.suffix.lower())
    if kind is None:
        allowed = ", ".join(KIND_BY_SUFFIX)
        raise DataError(f"'{name}' is of no kind that is read: its suffix is '{path.suffix}', allowed are {allowed}.")
    return Place(name, kind, path)


def _folder(name: str, folder: Path) -> Location:
    index = folder / "dataset_dict.json"
    if index.is_file():
        try:
            parts = list(json.loads(index.read_text(encoding="utf-8"))["splits"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"'{index}' does not list splits. Save the dataset again with save_to_disk.") from None
        return _divided({part: Place(name, "saved", folder / part, part) for part in parts}, name)
    if (folder / "state.json").is_file():
        return Location(Place(name, "saved", folder))
    files = {
        path.stem: _file(str(Path(name) / path.name), path)
        for path in sorted(folder.iterdir())
        if path.stem in ("train", *TEST_PARTS) and path.suffix.lower() in KIND_BY_SUFFIX and path.is_file()
    }
    if files:
        return _divided(files, name)
    # train/ without class folders below it is itself a class
    divided = {
        part: Place(name, "image-folder", folder / part, part)
        for part in ("train", *TEST_PARTS)
        if (folder / part).is_dir() and class_folders(folder / part)
    }
    if "train" in divided:
        return _divided(divided, name)
    if class_folders(folder):
        return Location(Place(name, "image-folder", folder))
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise DataError(f"the folder '{name}' is of no kind that is read (it holds {held}). Give {KINDS}.")


def _divided(places: Mapping[str, Place], name: str) -> Location:
    train = places.get("train") or (next(iter(places.values())) if len(places) == 1 else None)
    if train is None:
        raise DataError(f"'{name}' has the splits {', '.join(places)}, but none is named 'train'. Rename one of them.")
    tests = [places[part] for part in TEST_PARTS if part in places and places[part] != train]
    return Location(train, tests[0] if tests else None)


def places(data: DataConfig) -> tuple[Place, Place | None]:
    """Return where training rows lie, and test rows; None if these must be held out of the former."""
    location = locate(data.source)
    if data.test is None:
        return location.train, location.test
    return location.train, test_place(data.test)


def test_place(source: str | Path) -> Place:
    """Return where the test rows of a source lie: its test split, or all of it."""
    location = locate(source)
    return location.test or location.train


def load_rows(data: DataConfig, task: Task, *, client_column: str | None, seed: int) -> SourceRows:
    """Read the configured rows and divide them into training and test rows.

    Parameters
    ----------
    data : DataConfig
        Names the source and its columns.
    task : Task
        Which columns are needed.
    client_column : str, optional
        Column whose values name the clients.
    seed : int
        The run's seed, from which follows what is held out.

    Raises
    ------
    DataError
        The rows cannot be read or do not hold what is asked for; see `read_rows`.
    """
    place, test_rows = places(data)
    train = read_rows(place, data, task, labels=data.label_names, client_column=client_column)
    if test_rows is not None:
        test = read_rows(
            test_rows, data, task, labels=train.labels or None, client_column=client_column, optional=CLIENT
        )
        return SourceRows(train.rows, test.rows, train.labels)
    labels = np.asarray(train.rows.with_format("numpy")["label"][:]) if train.labels else None
    kept, held = hold_out(labels, len(train.rows), data.test_fraction, seed)
    return SourceRows(train.rows.select(kept), train.rows.select(held), train.labels)


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
    data: DataConfig, task: Task, client_column: str | None, optional: frozenset[str] = frozenset()
) -> Wanted:
    """Return the columns that a task reads, by the configuration's keys."""
    columns: dict[str, str | None]
    if task == "image-classification":
        columns = {"data.image": data.image or "image", "data.label": data.label or "label"}
    elif task == "causal-lm":
        columns = {"data.prompt": data.prompt or "prompt", "data.completion": data.completion or "completion"}
    else:
        columns = {
            "data.text": data.text or "text",
            "data.text_pair": data.text_pair,
            "data.label": data.label or "label",
        }
    columns |= {"data.domain": data.domain, "partition.by": client_column}
    return Wanted({key: column for key, column in columns.items() if column is not None}, optional)


def read_rows(
    place: Place,
    data: DataConfig,
    task: Task,
    *,
    labels: tuple[str, ...] | None,
    client_column: str | None = None,
    optional: frozenset[str] = frozenset(),
    only: Sequence[int] | None = None,
) -> Table:
    """Read the rows of one place and normalise their columns.

    Parameters
    ----------
    place : Place
        Where they lie.
    data : DataConfig
        Names the columns.
    task : Task
        Which of them are needed.
    labels : tuple of str, optional
        Names of all labels in the order of their ids; if None, those of the rows: in their own order where the column
        knows one, else by value where all are numbers, else alphabetically.
    client_column : str, optional
        Column whose values name the clients.
    optional : frozenset of str
        Configuration keys whose column may be missing.
    only : sequence of int, optional
        Which rows to take, from 0; all if not given.

    Raises
    ------
    DataError
        A column is missing; a row has no text, label, domain or client, or a label that is not in `labels`; or there is
        but one label.
    """
    wanted = wanted_columns(data, task, client_column, optional)
    raw = read(place, wanted)
    numbers = np.arange(1, len(raw) + 1) if only is None else np.asarray(only, dtype=np.int64) + 1
    if only is not None:
        raw = raw.select(only)
    table: pa.Table = raw.with_format("arrow")[:]
    columns: dict[str, Any] = {}
    features: dict[str, Any] = {}
    names: tuple[str, ...] = ()
    for key, column in wanted.columns.items():
        role = "client" if key == "partition.by" else key.removeprefix("data.")
        if column not in raw.column_names:
            continue
        if role == "label":
            ids, names = label_ids(place, column, table[column], raw.features[column], labels)
            columns[role], features[role] = ids, datasets.Value("int64")
        elif role == "image":
            columns[role], features[role] = _images(place, column, table[column]), datasets.Image()
        elif role in ("domain", "client"):
            codes, values = column_codes(place, column, table[column], raw.features[column])
            refuse_missing(place, column, codes < 0, "no value")
            columns[role] = pa.array(values, pa.large_string()).take(pa.array(codes))
            features[role] = datasets.Value("large_string")
        else:
            columns[role], features[role] = _text(place, column, table[column]), datasets.Value("large_string")
    columns["row"], features["row"] = numbers, datasets.Value("int64")
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return Table(datasets.Dataset(pa.table(columns), info=info), names)


def _text(place: Place, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_nested(cells.type) or pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type):
        raise DataError(f"column '{column}' of {place} holds {cells.type}, not text. Name a column of text.")
    text = cells.cast(pa.large_string())
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(text), ""), True)
    refuse_missing(place, column, blank.to_numpy(), "no text")
    return text


def _images(place: Place, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    missing = pc.is_null(cells).to_numpy()
    if _is_string(cells.type):
        missing |= pc.fill_null(pc.equal(cells, ""), True).to_numpy()
        refuse_missing(place, column, missing, "no image")
        paths = _resolved(place, cells.to_pylist())
        for row, path in enumerate(paths, start=1):
            if not path.is_file():
                raise DataError(
                    f"row {row} of {place} names the image '{path}', which is not a file. Correct the path."
                )
        cells = pa.chunked_array([pa.array([str(path) for path in paths], pa.string())])
    refuse_missing(place, column, missing, "no image")
    try:
        return pa.chunked_array([datasets.Image().cast_storage(chunk) for chunk in cells.chunks])
    except (TypeError, ValueError, pa.ArrowException):
        raise DataError(
            f"column '{column}' of {place} holds {cells.type}. Name a column of images, their bytes or their paths."
        ) from None


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _resolved(place: Place, paths: Iterable[str]) -> list[Path]:
    """Read paths as relative to the folder that the rows lie in."""
    if place.path is None:
        return [Path(path) for path in paths]
    base = (place.path if place.path.is_dir() else place.path.parent).resolve()
    return [base / path for path in paths]


def linked_files(place: Place, data: DataConfig, task: Task) -> list[Path]:
    """Return the image files that rows name by their paths, for rows whose images lie elsewhere."""
    if task != "image-classification" or place.kind not in ("csv", "json", "parquet", "saved"):
        return []
    column = data.image or "image"
    if place.kind == "parquet":
        assert place.path is not None
        try:
            schema = pq.read_schema(place.path)
        except (pa.ArrowException, OSError):
            return []  # reading the rows says what is wrong
        if column not in schema.names or not _is_string(schema.field(column).type):
            return []
    cells = read(place, Wanted({"data.image": column})).with_format("arrow")[:][column]
    return _resolved(place, [path for path in cells.to_pylist() if path]) if _is_string(cells.type) else []


def digest(place: Place, data: DataConfig, task: Task) -> str:
    """Return the SHA-256 of everything that the rows of a place are made of, without reading them as rows.

    Raises
    ------
    DataError
        A file cannot be read.
    """
    if place.path is None:
        return str(hub_dataset(place.name)[place.part]._fingerprint)
    files = sorted(path for path in place.path.rglob("*") if path.is_file()) if place.path.is_dir() else [place.path]
    total = hashlib.sha256()
    for path in [*files, *linked_files(place, data, task)]:
        named = str(path.relative_to(place.path)) if place.path.is_dir() and path.is_relative_to(place.path) else ""
        try:
            with path.open("rb") as file:
                total.update(f"{named}\x1f{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise unreadable(f"'{path}'", error) from None
    return total.hexdigest()
