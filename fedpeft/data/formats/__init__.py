"""The formats that rows are read from, one file each, and which of them a file or folder is of.

Nothing heavy is imported before rows are read: a command may ask what a path is before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.data.formats.client_files import CLIENT_FILES
from fedpeft.data.formats.delimited import CSV
from fedpeft.data.formats.hub import HUB
from fedpeft.data.formats.images import IMAGE_FOLDER
from fedpeft.data.formats.json_rows import JSON
from fedpeft.data.formats.parquet import PARQUET
from fedpeft.data.formats.record import Format as Format
from fedpeft.data.formats.saved import SAVED
from fedpeft.errors import DataError
from fedpeft.places import TEST_PARTS, Place, at, divided_name
from fedpeft.registry import Registry

FORMATS: Registry[Format] = Registry(
    "format of rows", "fedpeft.formats", (CSV, JSON, PARQUET, IMAGE_FOLDER, SAVED, CLIENT_FILES, HUB)
)
PACKED = ".gz"


def readable() -> str:
    """Say in one line what rows are read from."""
    every = FORMATS.all().values()
    *files, last = [each.description for each in every if each.suffixes]
    *others, end = [each.description for each in every if not each.suffixes]
    tables = f"a {', '.join(files)} or {last} file, a folder of such files named train and test"
    return f"{tables}, {', '.join(others)}, or {end}"


def by_suffix() -> dict[str, Format]:
    """Return the formats of files by their suffixes."""
    return {suffix: each for each in FORMATS.all().values() for suffix in each.suffixes}


def file_format(path: Path, known: Mapping[str, Format]) -> tuple[str, Format | None]:
    """Return the stem of a file's name, and what its suffixes say; None where they say nothing.

    Parameters
    ----------
    path : Path
        The file.
    known : mapping of str to Format
        Returned by `by_suffix`.
    """
    plain = path.with_suffix("") if path.suffix.lower() == PACKED else path
    format_ = known.get(plain.suffix.lower())
    return plain.stem, None if format_ is not None and not format_.packed and plain != path else format_


def tables_in(folder: Path) -> dict[str, list[Path]]:
    """Return a folder's files named train, test and validation."""
    known = by_suffix()
    tables: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        stem, format_ = file_format(path, known)
        if format_ is not None and stem in ("train", *TEST_PARTS) and path.is_file():
            tables.setdefault(stem, []).append(path)
    return tables


def folder_format(folder: Path) -> Format | None:
    """Return the format of a folder; None where it holds files of rows, or nothing that is read."""
    folders = [each for each in FORMATS.all().values() if each.splits is not None]
    for each in folders:
        if any((folder / name).is_file() for name in each.marks):
            return each
    if tables_in(folder):
        return None
    return next((each for each in folders if not each.marks and each.splits and each.splits("", folder)), None)


def implied_columns(source: str | None) -> Mapping[str, str]:
    """Return which columns a source's format has, by their keys in the section `data`."""
    if source is None:
        return {}
    folder = at(divided_name(source)[0])
    try:
        format_ = folder_format(folder) if folder.is_dir() else None
    except OSError:
        return {}  # finding the rows says what is wrong
    return {} if format_ is None else format_.implies


def first_rows(place: Place, encoding: str, count: int) -> list[dict[str, Any]]:
    """Return a place's first rows with all their columns; none where its format cannot say, or they are damaged.

    What is wrong with a place is said by whoever reads it.
    """
    first = FORMATS.find(place.kind).first
    try:
        return [] if first is None else first(place, encoding, count)
    except (DataError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError):
        return []


def training_place(source: str) -> Place | None:
    """Return where the training rows of a file or folder lie; None where that is not plain, or it is no path."""
    name, asked = divided_name(source)
    path, known = at(name), by_suffix()
    try:
        if path.is_file():
            format_ = file_format(path, known)[1]
            return None if format_ is None else Place(name, format_.name, path)
        if not path.is_dir():
            return None
        part = asked[-1] if asked else "train"
        format_ = folder_format(path)
        if format_ is not None and format_.splits is not None:
            places = format_.splits(name, path)
            return places.get(part) or places.get("")
        for file in tables_in(path).get(part, []):
            return training_place(str(file))
    except (OSError, DataError):
        pass  # finding the rows says what is wrong
    return None
