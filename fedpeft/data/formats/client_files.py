"""Folders with a file, or a folder, of rows for each client; its name is the column `file`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.data.formats.record import Format
from fedpeft.errors import DataError
from fedpeft.places import TEST_PARTS, Place, Wanted, counts

if TYPE_CHECKING:
    from collections.abc import Mapping

    import datasets
    import pyarrow as pa

COLUMN = "file"  # what partition.by names
TRAIN = "train"


def client_files(folder: Path, known: Mapping[str, Format]) -> dict[str, dict[str, list[Path]]]:
    """Return the files of each client by part, ``train`` and what holds test rows.

    A client is a file ``NAME.jsonl``, with ``NAME.test.jsonl`` beside it if it has test rows of its own; or a folder
    ``NAME`` with files named ``train`` and ``test``.

    Parameters
    ----------
    folder : Path
        Where they lie.
    known : mapping of str to Format
        Formats by the suffixes of their files.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(path for path in folder.iterdir() if counts(path)):
        files = [path] if path.is_file() else sorted(path.iterdir())
        for file in files:
            stem = _stem(file, known)
            if stem is None or not file.is_file():
                continue
            name, _, part = stem.rpartition(".") if file is path else (path.name, "", stem)
            if part not in (TRAIN, *TEST_PARTS):
                if file is not path:
                    continue
                name, part = stem, TRAIN
            found.setdefault(name, {}).setdefault(part, []).append(file)
    return dict(sorted(found.items())) if any(TRAIN in parts for parts in found.values()) else {}


def _stem(path: Path, known: Mapping[str, Format]) -> str | None:
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.stem if plain.suffix.lower() in known else None


def _formats() -> dict[str, Format]:
    from fedpeft.data.formats.delimited import CSV
    from fedpeft.data.formats.json_rows import JSON
    from fedpeft.data.formats.parquet import PARQUET

    return {suffix: each for each in (CSV, JSON, PARQUET) for suffix in each.suffixes}


def _splits(name: str, folder: Path) -> dict[str, Place]:
    clients = client_files(folder, _formats())
    if not clients:
        return {}
    for client, parts in clients.items():
        if TRAIN not in parts:
            raise DataError(f"the folder '{name}' has test rows of '{client}', but none to train on. Add them.")
        for files in parts.values():
            if len(files) > 1:
                several = ", ".join(str(path.relative_to(folder)) for path in files)
                raise DataError(f"the folder '{name}' has several files of client '{client}': {several}. Keep one.")
    parts_there = {part for parts in clients.values() for part in parts}
    return {part: Place(name, CLIENT_FILES.name, folder, part) for part in (TRAIN, *TEST_PARTS) if part in parts_there}


def _places(place: Place) -> list[tuple[str, Place]]:
    """Return each client's own place of one part, by the clients' names."""
    assert place.path is not None
    known = _formats()
    found = []
    for client, parts in client_files(place.path, known).items():
        for path in parts.get(place.part or TRAIN, ()):
            suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
            named = str(Path(place.name) / path.relative_to(place.path))
            found.append((client, Place(named, known[suffix.lower()].name, path)))
    return found


def _read(place: Place, wanted: Wanted) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    keys = {key: column for key, column in wanted.columns.items() if column != COLUMN}
    inner = Wanted(keys, wanted.optional, wanted.encoding, wanted.tolerant, wanted.nested)
    formats = {each.name: each for each in _formats().values()}
    tables: list[pa.Table] = []
    for client, own in _places(place):
        table = formats[own.kind].read(own, inner).with_format("arrow")[:]
        if not len(table):
            raise DataError(f"{own} holds no rows. Add some, or remove the file.")
        # asked for or not: it tells which file a row is of
        table = table.append_column(COLUMN, pa.array([client] * len(table), pa.large_string()))
        tables.append(table.replace_schema_metadata(None))
    if len({table.schema for table in tables}) > 1:  # files of several formats, or with other types
        tables = [_as_text(table, wanted.nested_columns) for table in tables]
    try:
        return datasets.Dataset(pa.concat_tables(tables, promote_options="default"))
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"the files in {place} differ in their columns ({error}). Give all the same.") from None


def _as_text(table: pa.Table, nested: frozenset[str]) -> pa.Table:
    import json

    import pyarrow as pa

    columns = {}
    for name in table.column_names:
        cells = table[name]
        if pa.types.is_nested(cells.type) and name in nested:
            words = [None if cell is None else json.dumps(cell, ensure_ascii=False) for cell in cells.to_pylist()]
            columns[name] = pa.chunked_array([pa.array(words, pa.large_string())])
        else:
            columns[name] = cells.cast(pa.large_string())
    return pa.table(columns)


def _begun(place: Place, rows: datasets.Dataset) -> tuple[tuple[int, str], ...]:
    import pyarrow.compute as pc

    counts = {each["values"]: each["counts"] for each in pc.value_counts(rows.data[COLUMN]).to_pylist()}
    begun: list[tuple[int, str]] = []
    before = 0
    for client, own in _places(place):
        begun.append((before, os.path.relpath(own.name, place.name)))
        before += counts.get(client, 0)
    return tuple(begun)


def _first(place: Place, encoding: str, count: int) -> list[dict[str, Any]]:
    formats = {each.name: each for each in _formats().values()}
    rows: list[dict[str, Any]] = []
    for _, own in _places(place):
        first = formats[own.kind].first
        rows += [] if first is None else first(own, encoding, count - len(rows))
        if len(rows) >= count:
            break
    return rows


def _cautions(place: Place) -> tuple[str, ...]:
    """Name files that could be read, but are no client's: those in a client's folder that have other names."""
    assert place.path is not None
    known = _formats()
    read = {path for parts in client_files(place.path, known).values() for paths in parts.values() for path in paths}
    inside = [each for each in place.path.iterdir() if counts(each) and each.is_dir()]
    files = sorted(path for each in inside for path in each.iterdir() if _stem(path, known) is not None)
    left = [str(path.relative_to(place.path)) for path in files if path not in read]
    if not left:
        return ()
    shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    return (
        f"{len(left)} files in '{place.name}' are not read: {shown}. In a client's folder call them train and test.",
    )


def _notes(place: Place) -> tuple[str, ...]:
    own = _places(place)
    shown = ", ".join(client for client, _ in own[:3]) + (", ..." if len(own) > 3 else "")
    return (f"{place} is {len(own)} files of rows, each a client's where partition.by = '{COLUMN}': {shown}",)


CLIENT_FILES = Format(
    "client-files",
    "a folder of one file of rows per client",
    _read,
    splits=_splits,
    notes=_notes,
    cautions=_cautions,
    first=_first,
    begun=_begun,
    files=lambda place: [own.path for _, own in _places(place) if own.path is not None],
)
