"""From a source's name to where its training and test rows lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedpeft.config import DataConfig
from fedpeft.data.formats import FORMATS, PACKED, by_suffix, file_format, folder_format, readable, tables_in
from fedpeft.errors import DataError, nearest
from fedpeft.places import TEST_PARTS, Place, at, divided_name, unreadable


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
        raise DataError(f"no rows are named. Give data.source: {readable()}.")
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
            parts = _folder(name, path)
            return _chosen(parts, name, ":".join(asked)) if asked else _divided(parts, name)
    except OSError as error:
        raise unreadable(f"'{name}'", error) from None
    configuration = asked[0] if len(asked) == 2 else None
    elsewhere = [] if isinstance(source, Path) else [each.named for each in FORMATS.all().values() if each.named]
    answers = (named(name, configuration) for named in elsewhere)
    splits = next((answer for answer in answers if answer is not None), None)
    if splits is None:
        raise DataError(f"there is no file or folder '{whole}'. Give the path of {readable()}.")
    return _chosen(splits, name, asked[-1]) if asked else _divided(splits, name)


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
    known = by_suffix()
    format_ = file_format(path, known)[1]
    if format_ is None:
        allowed = ", ".join(known)
        raise DataError(
            f"'{name}' is of no kind that is read: its suffix is '{path.suffix}', allowed are {allowed}, and {PACKED} "
            "behind those of text."
        )
    return Place(name, format_.name, path)


def _folder(name: str, folder: Path) -> dict[str, Place]:
    """Return the splits of a folder; one without a name where it has no splits."""
    format_ = folder_format(folder)
    if format_ is not None and format_.splits is not None:
        return format_.splits(name, folder)
    if tables := tables_in(folder):
        for part, paths in tables.items():
            if len(paths) > 1:
                several = ", ".join(path.name for path in paths)
                raise DataError(f"the folder '{name}' has several files of {part} rows: {several}. Keep one of them.")
        return {part: _file(str(Path(name) / path.name), path) for part, (path,) in tables.items()}
    content = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise DataError(f"the folder '{name}' is of no kind that is read (it holds {content}). Give {readable()}.")


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
