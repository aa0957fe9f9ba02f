"""Parquet, by whichever library it was written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.cache import cache_dir, explained
from fedpeft.data.formats.record import Format
from fedpeft.data.formats.text_files import CHUNK_ROWS
from fedpeft.errors import DataError
from fedpeft.places import Place, Wanted, in_one_line

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq


def _read(place: Place, wanted: Wanted) -> datasets.Dataset:
    """Copy the wanted columns to an Arrow file and map it, since images may not fit in memory."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fedpeft.data.formats.cells import stored

    assert place.path is not None
    try:
        file = pq.ParquetFile(place.path)
        stored_schema = file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _not_parquet(place, error) from None
    names = wanted.present(place, stored_schema.names)
    schema = _plain_schema(place, names, stored_schema)
    with explained(cache_dir()):
        cache_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="read-", ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / "rows.arrow"  # the map outlives this name
            with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in _parquet_batches(place, file, names):
                    rows = pa.Table.from_batches([batch])
                    columns = [stored(place, name, rows[name]) for name in names]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            return datasets.Dataset.from_file(str(copy))


def _plain_schema(place: Place, names: Sequence[str], stored_schema: pa.Schema) -> pa.Schema:
    """Return the types that the wanted columns are copied in, and what the library wrote of them if it is true."""
    import datasets
    import pyarrow as pa

    from fedpeft.data.formats.cells import not_read, stored

    kinds = {name: stored_schema.field(name).type for name in names}
    schema = pa.schema([(name, stored(place, name, pa.chunked_array([], kind)).type) for name, kind in kinds.items()])
    for name in names:
        try:
            datasets.Features.from_arrow_schema(pa.schema([schema.field(name)]))
        except (ValueError, NotImplementedError, pa.ArrowException):
            raise not_read(place, name, kinds[name], "texts, numbers or images") from None
    try:
        described: pa.Schema = datasets.Features.from_arrow_schema(
            schema.with_metadata(stored_schema.metadata)
        ).arrow_schema
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RecursionError, pa.ArrowException):
        return schema
    return described if described.types == schema.types and described.names == schema.names else schema


def _parquet_batches(place: Place, file: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(CHUNK_ROWS, columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(place, error) from None


def _not_parquet(place: Place, error: Exception) -> DataError:
    return DataError(f"{place} cannot be read as Parquet: {in_one_line(error)}. Check the file.")


def _may_link(place: Place, column: str) -> bool:
    """Say whether the schema has texts in a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fedpeft.data.formats.cells import is_text

    assert place.path is not None
    try:
        schema = pq.read_schema(place.path)
    except (pa.ArrowException, OSError):
        return False  # reading the rows says what is wrong
    return column in schema.names and is_text(schema.field(column).type)


def _first(place: Place, encoding: str, count: int) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert place.path is not None
    try:
        batch: pa.RecordBatch | None = next(pq.ParquetFile(place.path).iter_batches(count), None)
        return [] if batch is None else batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError):
        return []  # reading the rows says what is wrong


PARQUET = Format("parquet", "Parquet", _read, suffixes=(".parquet",), may_link=_may_link, first=_first)
