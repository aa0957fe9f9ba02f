"""Reading one table of rows from each kind of source, keeping only the columns asked for.

CSV and JSON are parsed here, all cells as text, because type guessing would turn texts such as ``007`` or
``2020-01-01`` into numbers and dates. Everything else is read by the `datasets` library.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fedpeft.cache import cache_dir, explained
from fedpeft.data.cells import not_read, stored
from fedpeft.data.delimited import read_delimited
from fedpeft.data.hub import hub_dataset, quiet
from fedpeft.data.json_rows import read_json
from fedpeft.data.text_files import CHUNK_ROWS, table
from fedpeft.errors import DataError
from fedpeft.places import (
    IMAGE_SUFFIXES,
    Kind,
    Place,
    Wanted,
    beside,
    class_folders,
    foreign_images,
    images_in,
    not_images,
    refuse_missing,
    unreadable,
)

__all__ = ["Kind", "Place", "Wanted", "folder_notes", "listed", "plain_batches", "read", "refuse_missing", "unreadable"]

SHOWN = 3  # files that a message names


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
    readers: dict[Kind, Callable[[Place, Wanted], datasets.Dataset]] = {
        "csv": read_delimited,
        "json": read_json,
        "parquet": _read_parquet,
        "image-folder": _read_image_folder,
        "saved": _read_saved,
        "hub": _read_hub,
    }
    with quiet():
        rows = readers[place.kind](place, wanted)
    if len(rows) == 0:
        raise DataError(f"{place} holds no rows. Give a source with at least one.")
    return rows


def plain_batches(rows: datasets.Dataset, size: int) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of up to `size` rows at a time as Python values; images as their bytes or path."""
    for batch in rows.with_format("arrow")[:].to_batches(max_chunksize=size):
        yield batch.to_pydict()


def listed(paths: Sequence[Path], base: Path) -> str:
    """Name the first few files by their paths in a folder."""
    names = [str(path.relative_to(base)) if path.is_relative_to(base) else str(path) for path in paths[:SHOWN]]
    return ", ".join(names) + (", ..." if len(paths) > SHOWN else "")


def _read_parquet(place: Place, wanted: Wanted) -> datasets.Dataset:
    """Copy the wanted columns to an Arrow file and map it, since images may not fit in memory."""
    assert place.path is not None
    try:
        file = pq.ParquetFile(place.path)
        held = file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _not_parquet(place, error) from None
    names = wanted.present(place, held.names)
    schema = _plain_schema(place, names, held)
    with explained(cache_dir()):
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="read-", ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / "rows.arrow"  # the map outlives this name
            with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in _parquet_batches(place, file, names):
                    rows = pa.Table.from_batches([batch])
                    columns = [stored(place, name, rows[name]) for name in names]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            return datasets.Dataset.from_file(str(copy))


def _plain_schema(place: Place, names: Sequence[str], held: pa.Schema) -> pa.Schema:
    """Return the types that the wanted columns are copied in, and what the library wrote of them if it is true."""
    kinds = {name: held.field(name).type for name in names}
    schema = pa.schema([(name, stored(place, name, pa.chunked_array([], kind)).type) for name, kind in kinds.items()])
    for name in names:
        try:
            datasets.Features.from_arrow_schema(pa.schema([schema.field(name)]))
        except (ValueError, NotImplementedError, pa.ArrowException):
            raise not_read(place, name, kinds[name], "texts, numbers or images") from None
    try:
        described: pa.Schema = datasets.Features.from_arrow_schema(schema.with_metadata(held.metadata)).arrow_schema
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RecursionError, pa.ArrowException):
        return schema
    return described if described.types == schema.types and described.names == schema.names else schema


def _parquet_batches(place: Place, file: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(CHUNK_ROWS, columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(place, error) from None


def _not_parquet(place: Place, error: Exception) -> DataError:
    return DataError(f"{place} cannot be read as Parquet: {_in_one_line(error)}. Check the file.")


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _read_image_folder(place: Place, wanted: Wanted) -> datasets.Dataset:
    base = place.path
    assert base is not None
    names = wanted.present(place, ["image", "label"])
    loose = [path for path in sorted(base.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    loose = [path for path in loose if path.name[0] != "." and path.is_file()]
    foreign = foreign_images(base)
    if loose and not wanted.tolerant:
        raise DataError(f"'{loose[0]}' lies outside every class folder of {place}. Move it into one, or remove it.")
    if foreign and not wanted.tolerant:
        raise DataError(
            f"{place} holds {len(foreign)} images of kinds that are not read ({listed(foreign, base)}). "
            "Convert them to PNG or JPEG, or remove them."
        )
    images = [path for folder in class_folders(base) for path in images_in(folder)]
    if unnamed := [path for path in images if not _is_text(str(path))]:
        raise DataError(
            f"{place} holds {len(unnamed)} images whose names are no text in UTF-8 "
            f"({ascii(listed(unnamed, base))[1:-1]}). Rename them or their folders."
        )
    # as in any other source, paths are relative to the folder that the rows lie in
    rows = [(str(path.relative_to(base)), folder.name) for folder in class_folders(base) for path in images_in(folder)]
    rows += [(str(path), "") for path in (*loose, *foreign)]  # where they are tolerated, as rows without a label
    return table(place, rows, ["image", "label"]).select_columns(names)


def _is_text(name: str) -> bool:
    """Say whether a name from the file system has no bytes that stand for no character."""
    return not any("\ud800" <= letter < "\ue000" for letter in name)


def folder_notes(place: Place) -> tuple[str, ...]:
    """Say in one line each what in a folder of images is no row."""
    base = place.path
    assert base is not None
    files, folders = not_images(base)
    notes = []
    if files:
        notes.append(f"files in {place} that are no images and no rows: {len(files)} ({listed(files, base)})")
    if folders:
        notes.append(
            f"folders in {place} without images, which are no classes: {len(folders)} ({listed(folders, base)})"
        )
    if place.part == "train" and (others := beside(base.parent)):
        notes.append(
            f"folders of images in '{place.name}' that belong to no split and are no rows: {len(others)} "
            f"({listed(others, base.parent)})"
        )
    return tuple(notes)


def _read_saved(place: Place, wanted: Wanted) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(str(place.path))
        names = list(loaded.column_names)
    except IndexError:  # the library's answer where no file holds rows
        raise DataError(f"{place} holds no rows. Give a source with at least one.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, pa.ArrowException) as error:
        raise DataError(
            f"{place} cannot be read as a saved dataset: {_in_one_line(error)}. Write it anew by save_to_disk."
        ) from None
    return loaded.select_columns(wanted.present(place, names))


def _read_hub(place: Place, wanted: Wanted) -> datasets.Dataset:
    loaded = hub_rows(place)
    return loaded.select_columns(wanted.present(place, loaded.column_names))


def hub_rows(place: Place) -> datasets.Dataset:
    """Return all columns of a split of the hub."""
    if place.configuration is None:
        return hub_dataset(place.name)[place.part]
    return hub_dataset(place.name, place.configuration)[place.part]
