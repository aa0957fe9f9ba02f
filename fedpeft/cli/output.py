"""Standard output and error that end no command: a full disk, a reader that went away, letters that the encoding lacks.

A command does and saves all that it was asked for, whoever listens; what became of its output is looked at once, at
its end.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from pathlib import Path
from typing import TextIO, cast

NARROW = 60  # columns: tables that are laid out for fewer lose what they hold; a terminal may break their lines
READER_GONE = 141  # what a shell makes of a program that SIGPIPE ended


class _Descriptor(io.RawIOBase):
    """A file descriptor that is written to until that fails, and then takes what it is given to nowhere."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        while self.failure is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # a pipe that somebody else made not to wait
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(data)


def _secured(stream: TextIO | None, descriptor: int) -> tuple[TextIO, _Descriptor]:
    if stream is None:  # closed: the next file to be opened would take its number, and be printed into
        descriptor = os.open(os.devnull, os.O_RDWR)
    raw = _Descriptor(descriptor)
    text = io.TextIOWrapper(
        io.BufferedWriter(cast(io.RawIOBase, raw)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
    )
    return text, raw


_saved: list[Path] = []


def saved(path: Path) -> None:
    """Remember what a command leaves, for whoever does not get to read it."""
    _saved.append(path)


class Output:
    """What became of what a command printed.

    Parameters
    ----------
    raw : raw stream or None
        Standard output's; None where somebody else has put a stream in its place, whose errors are theirs.
    """

    def __init__(self, raw: _Descriptor | None) -> None:
        self._raw = raw

    def exit_code(self, code: int) -> int:
        """Return how to exit: as the command ended, unless that was well and its output did not arrive."""
        sys.stdout.flush()
        failure = None if self._raw is None else self._raw.failure
        if failure is None:
            return code
        if failure.errno == errno.EPIPE:
            return code or READER_GONE
        kept = "".join(f" '{path}' is complete." for path in _saved)
        print(f"error: cannot write to stdout: {failure.strerror}; what was printed is lost.{kept}", file=sys.stderr)
        return code or 1


def secure() -> Output:
    """Put streams that never fail in the place of stdout and stderr, unless somebody has put others there."""
    _saved.clear()
    _widen()
    raw: _Descriptor | None = None
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)  # takes the lowest number that is free, here and below
    if sys.stdout is sys.__stdout__:
        sys.stdout, raw = _secured(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr, _ = _secured(sys.stderr, 2)
    return Output(raw)


def _widen() -> None:
    """Have tables laid out for some columns at least, and for the usual ones where a terminal says that it has none."""
    columns_set = os.environ.get("COLUMNS", "")
    try:
        columns = int(columns_set) if columns_set.isdecimal() else os.get_terminal_size(1).columns
    except OSError:
        return
    if columns == 0:
        os.environ.pop("COLUMNS", None)
    elif columns < NARROW:
        os.environ["COLUMNS"] = str(NARROW)
