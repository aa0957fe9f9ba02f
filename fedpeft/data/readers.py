"""Reading one table of rows from each kind of source, keeping only the columns asked for.

CSV and JSON are parsed here, all cells as text, because type guessing would turn texts such as ``007`` or
``2020-01-01`` into numbers and dates. Everything else is read by the `datasets` library.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TextIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedpeft.cache import cache_dir, explained
from fedpeft.errors import DataError

Kind = Literal["csv", "json", "parquet", "image-folder", "saved", "hub"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
HUB_TIMEOUT_S = 5.0
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Place:
    """Where one table of rows lies.

    Parameters
    ----------
    name : str
        What the user called the source.
    kind : Kind
        How it is read.
    path : Path, optional
        File or folder; None for a hub id.
    part : str, optional
        Split of a source that has several.
    """

    name: str
    kind: Kind
    path: Path | None
    part: str | None = None

    def __str__(self) -> str:
        return f"'{self.name}'" if self.part is None else f"split '{self.part}' of '{self.name}'"


@dataclass(frozen=True)
class Wanted:
    """The columns to read.

    Parameters
    ----------
    columns : mapping of str to str
        Configuration key to the column that it names.
    optional : frozenset of str
        Keys whose column may be missing.
    """

    columns: Mapping[str, str]
    optional: frozenset[str] = frozenset()

    def present(self, place: Place, names: Sequence[str]) -> list[str]:
        """Return those that a source has.

        Raises
        ------
        DataError
            One that must be there is not.
        """
        for key, column in self.columns.items():
            if column not in names and key not in self.optional:
                near = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, column, name).ratio())
                raise DataError(
                    f"{place} has no column '{column}' ({key}). It has: {', '.join(near)}. Set {key} to one of them."
                )
        return [name for name in dict.fromkeys(self.columns.values()) if name in names]


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
        "csv": _read_csv,
        "json": _read_json,
        "parquet": _read_parquet,
        "image-folder": _read_image_folder,
        "saved": _read_saved,
        "hub": _read_hub,
    }
    with _quiet():
        rows = readers[place.kind](place, wanted)
    if len(rows) == 0:
        raise DataError(f"{place} holds no rows. Give a source with at least one.")
    return rows


def refuse_missing(place: Place, column: str, missing: NDArray[np.bool_], what: str) -> None:
    """Raise for the first row that a mask marks, if any.

    Raises
    ------
    DataError
        Naming row, column and what is missing.
    """
    if missing.any():
        row = int(missing.argmax()) + 1
        more = f" (and {int(missing.sum()) - 1} more)" if missing.sum() > 1 else ""
        raise DataError(f"row {row} of {place}{more} has {what} in column '{column}'. Fill it in or remove the row.")


def unreadable(what: object, error: OSError) -> DataError:
    """Return the error for a file that exists but cannot be opened."""
    return DataError(f"cannot read {what}: {error.strerror or error}. Check the path and its permissions.")


def plain_batches(rows: datasets.Dataset, size: int) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of up to `size` rows at a time as Python values; images as their bytes or path."""
    for batch in rows.with_format("arrow")[:].to_batches(max_chunksize=size):
        yield batch.to_pydict()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars off inside the block."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _opened(place: Place) -> Iterator[TextIO]:
    assert place.path is not None
    try:
        with place.path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except OSError as error:
        raise unreadable(place, error) from None


def _table(rows: Iterable[Sequence[str | None]], names: Sequence[str]) -> datasets.Dataset:
    """Build a table of text chunk by chunk, so that Python objects exist for one chunk only."""
    schema = pa.schema([(name, pa.large_string()) for name in names])
    batches, chunk = [], []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK_ROWS:
            batches.append(_batch(chunk, schema))
            chunk = []
    batches.append(_batch(chunk, schema))
    return datasets.Dataset(pa.Table.from_batches(batches, schema))


def _batch(rows: Sequence[Sequence[str | None]], schema: pa.Schema) -> pa.RecordBatch:
    columns = [[row[index] for row in rows] for index in range(len(schema))]
    return pa.record_batch([pa.array(column, pa.large_string()) for column in columns], schema)


def _read_csv(place: Place, wanted: Wanted) -> datasets.Dataset:
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    try:
        with _opened(place) as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if not header:
                raise DataError(f"{place} is empty. Its first line must name the columns.")
            names = wanted.present(place, header)
            for name in names:
                if header.count(name) > 1:
                    raise DataError(f"{place} has {header.count(name)} columns named '{name}'. Rename all but one.")
            return _table(_csv_cells(place, reader, len(header), [header.index(name) for name in names]), names)
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num} of {place} is malformed: {error}. "
            "Close every quote, and double those inside a field."
        ) from None
    finally:
        csv.field_size_limit(limit)


def _csv_cells(place: Place, reader: Any, width: int, chosen: Sequence[int]) -> Iterator[list[str]]:
    for row in reader:
        if not row:
            continue  # blank line
        if len(row) != width:
            raise DataError(
                f"line {reader.line_num} of {place} has {len(row)} fields, but the header has {width}. "
                "Quote fields that hold commas or line breaks."
            )
        yield [row[index] for index in chosen]


def _read_json(place: Place, wanted: Wanted) -> datasets.Dataset:
    seen: dict[str, None] = {}
    columns = list(dict.fromkeys(wanted.columns.values()))

    def cells() -> Iterator[list[str | None]]:
        for number, (where, record) in enumerate(_json_records(place), start=1):
            if not isinstance(record, dict):
                raise DataError(
                    f"{where} of {place} is not a JSON object. Write one object a line, or a list of objects."
                )
            seen.update(dict.fromkeys(record))
            yield [_json_text(place, number, column, record.get(column)) for column in columns]

    rows = _table(cells(), columns)
    if len(rows) == 0:
        raise DataError(f"{place} holds no rows. Write one JSON object a line.")
    return rows.select_columns(wanted.present(place, list(seen)))


def _json_records(place: Place) -> Iterator[tuple[str, object]]:
    with _opened(place) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        try:
            if first == "[":
                yield from ((f"row {number}", record) for number, record in enumerate(json.load(file), start=1))
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}" if first == "[" else f"line {number}"
            raise DataError(
                f"{where} of {place} is not valid JSON: {error.msg} at column {error.colno}. Write one object a line."
            ) from None


def _json_text(place: Place, number: int, column: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else repr(value)
    raise DataError(
        f"row {number} of {place} holds a {type(value).__name__} in column '{column}'. Give a text or a number."
    )


def _read_parquet(place: Place, wanted: Wanted) -> datasets.Dataset:
    """Copy the wanted columns to an Arrow file and map it, since images may not fit in memory."""
    assert place.path is not None
    try:
        file = pq.ParquetFile(place.path)
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(place, error) from None
    names = wanted.present(place, file.schema_arrow.names)
    schema = pa.schema([file.schema_arrow.field(name) for name in names], file.schema_arrow.metadata)
    with explained(cache_dir()):
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="read-", ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / "rows.arrow"  # the map outlives this name
            with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in _parquet_batches(place, file, names):
                    writer.write_batch(batch.select(names))
            return datasets.Dataset.from_file(str(copy))


def _parquet_batches(place: Place, file: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(_CHUNK_ROWS, columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(place, error) from None


def _not_parquet(place: Place, error: Exception) -> DataError:
    return DataError(f"{place} cannot be read as Parquet: {str(error).splitlines()[0]} Check the file.")


def _read_image_folder(place: Place, wanted: Wanted) -> datasets.Dataset:
    assert place.path is not None
    names = wanted.present(place, ["image", "label"])
    # as in any other source, paths are relative to the folder that the rows lie in
    rows = [
        (str(path.relative_to(place.path)), folder.name)
        for folder in class_folders(place.path)
        for path in images_in(folder)
    ]
    loose = [path for path in sorted(place.path.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if loose:
        raise DataError(f"'{loose[0]}' lies outside every class folder of {place}. Move it into one, or remove it.")
    return _table(rows, ["image", "label"]).select_columns(names)


def class_folders(folder: Path) -> list[Path]:
    """Return the sub-folders that hold images, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and any(_images(path)))


def images_in(folder: Path) -> list[Path]:
    """Return the images anywhere below a folder, by path."""
    return sorted(_images(folder))


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_saved(place: Place, wanted: Wanted) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(str(place.path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{place} cannot be read as a saved dataset: {str(error).splitlines()[0]}. Write it anew by save_to_disk."
        ) from None
    return loaded.select_columns(wanted.present(place, loaded.column_names))


def _read_hub(place: Place, wanted: Wanted) -> datasets.Dataset:
    loaded = hub_dataset(place.name)[place.part]
    return loaded.select_columns(wanted.present(place, loaded.column_names))


@lru_cache(maxsize=2)
def hub_dataset(name: str) -> datasets.DatasetDict:
    """Load a dataset of the Hugging Face hub, from the library's own cache where the hub cannot be reached.

    Raises
    ------
    DataError
        The hub has none of that name, or it cannot be reached and nothing is cached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    unknown = f"'{name}' is neither a file or folder here"
    advice = "Check the spelling, or give the path of a file or folder."
    before = offline = datasets.config.HF_HUB_OFFLINE
    try:
        if not offline:
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError):
        raise DataError(f"{unknown} nor a public dataset on the hub. {advice}") from None
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError):
        offline = True
    try:
        datasets.config.HF_HUB_OFFLINE = offline  # else the library retries for half a minute
        with _quiet():
            loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if offline:
            raise DataError(f"{unknown}, nor can the hub be reached. {advice}") from None
        what = str(error).strip().splitlines()[0]
        raise DataError(
            f"the hub's dataset '{name}' cannot be read: {what} Write what you need of it with save_to_disk."
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return loaded
