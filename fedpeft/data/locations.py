"""From a source's name to where its training and test rows lie."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedpeft.config import DataConfig
from fedpeft.data.hub import hub_dataset
from fedpeft.errors import DataError, nearest
from fedpeft.places import (
    KIND_BY_SUFFIX,
    PACKED,
    TEST_PARTS,
    Place,
    at,
    divided_name,
    image_folders,
    table_kind,
    tables_in,
    unreadable,
)

KINDS = (
    "a CSV, JSON lines or Parquet file, a folder of such files named train and test, a folder of images in one "
    "sub-folder per class, a folder written by save_to_disk, or a dataset of the hub"
)
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


def locate(source: str | Path | None) -> Location:
    """Find a source by its path, or failing that by its id on the hub; ``source:split`` is that split alone.

    Only a plain ``name`` or ``owner/name`` without a file suffix can be a hub id, so that a mistyped path is never
    asked for on the network.

    Raises
    ------
    DataError
        There is no such file or folder, it is of none of the kinds read here, or the hub does not have it.
    """
    if source is None or not str(source).strip():
        raise DataError(f"no rows are named. Give data.source: {KINDS}.")
    whole = str(source)
    name, asked = divided_name(whole)
    path = at(name)
    try:
        if path.is_file():
            if asked:
                part = ":".join(asked)
                raise DataError(f"'{name}' is a file, which has no split '{part}'. Leave out ':{part}'.")
            return Location(_file(name, path))
        if path.is_dir():
            found = _folder(name, path)
            return _chosen(found, name, ":".join(asked)) if asked else _divided(found, name)
    except OSError as error:
        raise unreadable(f"'{name}'", error) from None
    if isinstance(source, Path) or not re.fullmatch(HUB_ID, name) or re.search(FILE_SUFFIX, name):
        raise DataError(f"there is no file or folder '{whole}'. Give the path of {KINDS}.")
    configuration = asked[0] if len(asked) == 2 else None
    parts = hub_dataset(name) if configuration is None else hub_dataset(name, configuration)
    found = {part: Place(name, "hub", None, part, configuration) for part in parts}
    return _chosen(found, name, asked[-1]) if asked else _divided(found, name)


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


def _file(name: str, path: Path) -> Place:
    kind = table_kind(path)[1]
    if kind is None:
        allowed = ", ".join(KIND_BY_SUFFIX)
        raise DataError(
            f"'{name}' is of no kind that is read: its suffix is '{path.suffix}', allowed are {allowed}, and {PACKED} "
            "behind those of text."
        )
    return Place(name, kind, path)


def _folder(name: str, folder: Path) -> dict[str, Place]:
    """Return the splits of a folder; one without a name where it has no splits."""
    index = folder / "dataset_dict.json"
    if index.is_file():
        try:
            parts = [str(part) for part in json.loads(index.read_text(encoding="utf-8"))["splits"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"'{index}' does not list splits. Save the dataset again with save_to_disk.") from None
        if not parts:
            raise DataError(f"'{index}' lists no split. Save the dataset again with save_to_disk.")
        return {part: Place(name, "saved", folder / part, part) for part in parts}
    if (folder / "state.json").is_file():
        return {"": Place(name, "saved", folder)}
    if tables := tables_in(folder):
        for part, paths in tables.items():
            if len(paths) > 1:
                several = ", ".join(path.name for path in paths)
                raise DataError(f"the folder '{name}' has several files of {part} rows: {several}. Keep one of them.")
        return {part: _file(str(Path(name) / path.name), path) for part, (path,) in tables.items()}
    if images := image_folders(folder):
        return {part or "": Place(name, "image-folder", path, part) for part, path in images.items()}
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise DataError(f"the folder '{name}' is of no kind that is read (it holds {held}). Give {KINDS}.")


def _divided(places: Mapping[str, Place], name: str) -> Location:
    train = places.get("train") or (next(iter(places.values())) if len(places) == 1 else None)
    if train is None:
        first = next(iter(places))
        raise DataError(
            f"'{name}' has the splits {', '.join(places)}, but none is named 'train'. "
            f"Name one behind a colon, such as {name}:{first}."
        )
    tests = [places[part] for part in TEST_PARTS if part in places and places[part] != train]
    parts = tuple(places) if train.part is not None else ()
    return Location(replace(train, parts=parts), replace(tests[0], parts=parts) if tests else None)


def _chosen(places: Mapping[str, Place], name: str, part: str) -> Location:
    if part not in places:
        if "" in places:
            raise DataError(f"'{name}' is not divided, so that it has no split '{part}'. Leave out ':{part}'.")
        raise DataError(f"'{name}' has no split '{part}'. {nearest(part, places)}")
    return Location(replace(places[part], parts=tuple(places)))
