"""Text files, packed or not, in any encoding; and tables of what they hold."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, TextIO, cast

from fedpeft.errors import DataError
from fedpeft.places import Place, unreadable

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

CHUNK_ROWS = 4096
HALF = re.compile("[\ud800-\udfff]")  # of a character
GZIP_MARK = b"\x1f\x8b"
CHUNK_BYTES = 1 << 16
MARKS = {  # the longer first: that of UTF-16 begins one of UTF-32
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@contextlib.contextmanager
def opened(place: Place, encoding: str, *, tolerant: bool = False) -> Iterator[TextIO]:
    """Open a file of text; one that begins like gzip is unpacked, whatever its name.

    Parameters
    ----------
    place : Place
        The file.
    encoding : str
        Its encoding.
    tolerant : bool
        Take what the encoding does not know for halves of characters, which `table` looks for.

    Raises
    ------
    DataError
        It cannot be read, or holds what the encoding does not know, or the packed data is damaged.
    """
    try:
        try:
            errors = "surrogateescape" if tolerant else "strict"
            with _unpacked(place) as file:
                codec = _past_mark(place, encoding, file)
                with io.TextIOWrapper(file, codec, errors, newline="") as text:
                    yield text
        except UnicodeError as error:
            raise _undecodable(place, encoding, error) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{place} is no whole gzip file: {error}. Fetch or pack it again.") from None
    except OSError as error:
        raise unreadable(place, error) from None


def table(
    place: Place, rows: Iterable[Sequence[str | None]], names: Sequence[str], *, tolerant: bool = False
) -> datasets.Dataset:
    """Build a table of text chunk by chunk, so that Python objects exist for one chunk only.

    Raises
    ------
    DataError
        A cell holds half a character; a `tolerant` table has an empty one there.
    """
    import datasets
    import pyarrow as pa

    schema = pa.schema([(name, pa.large_string()) for name in names])
    batches: list[pa.RecordBatch] = []
    chunk: list[Sequence[str | None]] = []
    done = 0

    def close() -> None:
        columns = [[row[index] for row in chunk] for index in range(len(names))]
        try:
            arrays = [pa.array(column, pa.large_string()) for column in columns]
        except UnicodeEncodeError:
            raise _halved(place, names, columns, done) from None
        batches.append(pa.record_batch(arrays, schema))

    for row in rows:
        chunk.append([None if cell and HALF.search(cell) else cell for cell in row] if tolerant else row)
        if len(chunk) == CHUNK_ROWS:
            close()
            done, chunk = done + len(chunk), []
    close()
    return datasets.Dataset(pa.Table.from_batches(batches, schema))


def refuse_nul(place: Place, first: str) -> None:
    """Refuse a file whose first line shows that it is UTF-16 without the mark that would say so."""
    if "\0" in first:
        raise DataError(
            f"the first line of {place} holds NUL characters, as UTF-16 without its mark does. "
            "Set data.encoding=utf-16-le or utf-16-be, or save it as UTF-8."
        )


@contextlib.contextmanager
def _unpacked(place: Place) -> Iterator[BinaryIO]:
    assert place.path is not None
    with place.path.open("rb") as file:
        # browsers unpack what they fetch without taking the suffix off, and servers pack what has none
        packed = file.read(2) == GZIP_MARK
        file.seek(0)
        if not packed:
            yield file
            return
        inside = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        if inside.read(2) == GZIP_MARK:
            raise DataError(f"{place} is packed by gzip twice. Unpack it once.")
        inside.seek(0)
        yield inside


def _past_mark(place: Place, encoding: str, file: BinaryIO) -> str:
    """Return the codec that leaves out a byte order mark, where the file begins with the encoding's own."""
    head = file.read(4)
    file.seek(0)
    asked = codecs.lookup(encoding).name
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if marked is None:
        return encoding
    family = marked.removesuffix("-le").removesuffix("-be")
    if asked not in (marked, family, f"{family}-sig"):
        raise DataError(
            f"{place} is not text in {encoding}: it begins with the mark of {family.upper()}. Set "
            f"data.encoding={family}."
        )
    return "utf-8-sig" if family == "utf-8" else family


def _undecodable(place: Place, encoding: str, error: UnicodeError) -> DataError:
    """Say where the first byte is that the encoding does not know."""
    line, what = 1, str(error)
    with _unpacked(place) as file:
        wide = b"\0" in file.read(8)  # no text has NUL characters at its beginning
        file.seek(0)
        decoder = codecs.getincrementaldecoder(_past_mark(place, encoding, file))()
        try:
            while chunk := file.read(CHUNK_BYTES):
                line += decoder.decode(chunk).count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as undecoded:
            line += undecoded.object[: undecoded.start].decode(encoding, "ignore").count("\n")
            what = f"byte 0x{undecoded.object[undecoded.start]:02x} in line {line} ({undecoded.reason})"
        except UnicodeError as undecoded:
            what = str(undecoded)
    others = "cp1252, latin-1 or utf-16"
    if codecs.lookup(encoding).name != "utf-8":
        others = "utf-8"
    elif wide:
        others = "utf-16-le or utf-16-be"
    return DataError(
        f"{place} is not text in {encoding}: {what}. Set data.encoding to what it was saved in, such as {others}, "
        "or save it as UTF-8."
    )


def _halved(place: Place, names: Sequence[str], columns: Sequence[Sequence[str | None]], done: int) -> DataError:
    for row in range(len(columns[0])):
        for name, cells in zip(names, columns, strict=True):
            for character in cells[row] or "":
                if 0xD800 <= ord(character) < 0xE000:
                    return DataError(
                        f"row {done + row + 1} of {place} holds half a character (\\u{ord(character):04x}) in column "
                        f"'{name}', as a text that was cut inside an emoji. Repair it or remove the row."
                    )
    raise AssertionError("nothing that UTF-8 lacks")
