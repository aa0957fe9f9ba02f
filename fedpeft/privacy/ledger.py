"""The book of what was spent: one JSON object a line, appended and synced to disk before anybody trains.

A charge is written for ALL steps of a message before the first of them is made. So whatever is killed, and whenever,
the book never holds less than what was released. A charge that names its release (the hash of everything that a seeded
training depends on) is written once, however often the very same numbers are computed again; one that names none is
written every time.

What somebody does to the file meanwhile is noticed, or makes no difference: lines are chained
(`fedpeft.privacy.chain`), how far the book had come is kept elsewhere (`fedpeft.privacy.anchors`) and in the memory of
this process, and no book begins anew unless somebody says so (`Ledger.create`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from fedpeft.cache import sync
from fedpeft.errors import LedgerError
from fedpeft.privacy.anchors import Anchor, kept_there_before, read_anchor, write_anchor
from fedpeft.privacy.chain import (
    Entry,
    Head,
    Keeper,
    Link,
    entry_line,
    entry_link,
    head_link,
    is_unchained,
)

__all__ = ["EVERYBODY", "LEDGER", "Entry", "Ledger", "read_entries"]

log = logging.getLogger(__name__)

LEDGER = "ledger.jsonl"  # in a run directory
EVERYBODY = "*"
LOCK_SECONDS = 30.0  # to wait for another process that writes a line
LOOK_SECONDS = 0.01  # between two looks whether it is done

_remembered: dict[str, Anchor] = {}  # by ledger's id, what this process has seen, whatever becomes of the disk


class Ledger:
    """An append-only file of entries.

    Parameters
    ----------
    path : Path
        The file, which must be there: see `create`.
    keeper : {"site", "run"}, optional
        Whose it must be; anybody's if not given.

    Notes
    -----
    Several processes may hold the same file open, under whatever names: each locks the file itself and reads what the
    others wrote before it looks at a budget and charges, see `held`.
    """

    def __init__(self, path: Path, keeper: Keeper | None = None) -> None:
        try:
            self.path = path.expanduser().resolve()
        except (OSError, RuntimeError) as error:  # links in a circle, or nobody's home
            raise LedgerError(
                f"'{path}' leads to no privacy ledger. Name a file that can be reached ({error})."
            ) from None
        self._keeper = keeper
        self._mutex = threading.RLock()
        self._file: BinaryIO | None = None  # while it is held
        self._holder = 0  # the process that holds it: a fork of it holds nothing
        self._head: Head | None = None
        self._hashes: list[str] = []  # of the first line, and of each entry
        self._entries: list[Entry] = []
        self._of_client: dict[str, list[Entry]] = {}  # a run looks at one client's for every message
        self._releases: set[tuple[str, str, str]] = set()
        self._size = 0  # bytes that were read
        self._last = b""  # the last line of them, with its end if it has one

    @classmethod
    def create(cls, path: Path, keeper: Keeper = "site", entries: Iterable[Entry] = ()) -> Ledger:
        """Begin a book, which must not be there.

        Parameters
        ----------
        path : Path
            The file; its folder is made if need be.
        keeper : {"site", "run"}
            See `fedpeft.privacy.chain.Head`.
        entries : iterable of Entry
            Charges that were made already.

        Raises
        ------
        LedgerError
            There is such a file, or it cannot be written.
        """
        ledger, head = cls(path, keeper), Head(uuid.uuid4().hex, keeper)
        lines = [head.line()]
        last = Anchor(0, head_link(lines[0])[1].hash)
        for count, entry in enumerate(entries, start=1):
            lines.append(entry_line(entry.countable(), count, last.hash))
            last = Anchor(count, entry_link(lines[-1], count, last.hash).hash)
        whole = b"".join(line + b"\n" for line in lines)
        partial, taken = ledger.path.with_name(f".{head.ledger}"), False
        try:
            ledger.path.parent.mkdir(parents=True, exist_ok=True)
            ledger.path.open("xb").close()
            taken = True  # the name, before anything is written
            with partial.open("xb") as file:
                file.write(whole)
                file.flush()
                os.fsync(file.fileno())
            write_anchor(ledger.path, head, last)
            partial.replace(ledger.path)
            taken = False
            sync(ledger.path.parent)
        except FileExistsError:
            raise LedgerError(
                f"'{ledger.path}' is there already, and nothing is overwritten; a ledger goes on where it was."
            ) from None
        except OSError as error:
            raise ledger._unwritable(error) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
                if taken:
                    ledger.path.unlink()
        return ledger

    @contextlib.contextmanager
    def held(self) -> Iterator[Ledger]:
        """Keep other processes out, and know all that they wrote.

        Raises
        ------
        LedgerError
            The file is not there, damaged, older than what is known, cannot be read, or another process holds it for
            too long.
        """
        with self._mutex:
            if self._file is not None and self._holder == os.getpid():
                yield self
                return
            with self._locked(write=True) as file:
                self._file, self._holder = file, os.getpid()
                try:
                    self._read(file, repair=True)
                    yield self
                finally:
                    self._file = None

    def entries(self, client: str | None = None, run: str | None = None) -> list[Entry]:
        """Return what is written, of one client or run if they are named."""
        with self.held():
            own = self._entries if client is None else self._of_client.get(client, [])
            return [entry for entry in own if run in (None, entry.run)]

    def is_charged(self, entry: Entry) -> bool:
        """Tell whether the very same release is on the books already."""
        return bool(entry.release) and (entry.run, entry.client, entry.release) in self._releases

    def charge(self, entry: Entry) -> bool:
        """Write an entry, and return when it is on the disk; False where its release is on the books already.

        Raises
        ------
        LedgerError
            It cannot be written: then nobody may train.
        """
        with self.held():
            assert self._file is not None
            assert self._head is not None
            if self.is_charged(entry):
                return False
            known = self._anchor()
            line = entry_line(entry.countable(), known.count + 1, known.hash)
            link = entry_link(line, known.count + 1, known.hash)
            write_anchor(self.path, self._head, Anchor(known.count + 1, link.hash, line.decode()))
            try:
                self._append(self._file, line, link)
            except OSError as error:
                with contextlib.suppress(OSError, LedgerError):  # nobody trains on it: then it counts for nothing
                    self._file.truncate(self._size)
                    write_anchor(self.path, self._head, known)
                raise self._unwritable(error) from None
            return True

    def view(self) -> list[Entry]:
        """Return what is written, for whoever may read the file and not write it."""
        with self._mutex, self._locked(write=False) as file:
            self._read(file, repair=False)
            return list(self._entries)

    # --- the file -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, *, write: bool) -> Iterator[BinaryIO]:
        """Open the file and lock what was opened: two names of one file have one lock."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            with self._opened(write=write) as file:
                self._lock(file.fileno(), deadline, write=write)
                # while this waited, another file may have been put in its place
                if self._is_at_path(file.fileno()):
                    yield file
                    return

    def _opened(self, *, write: bool) -> BinaryIO:
        # without waiting for the other end of a pipe
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK
        try:
            descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            raise self._missing() from None
        except OSError as error:
            raise (self._unwritable if write else self._unreadable)(error) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise LedgerError(f"'{self.path}' is no file, so that no privacy ledger can be kept there; name one.")
        return os.fdopen(descriptor, "r+b" if write else "rb", buffering=0)

    def _lock(self, descriptor: int, deadline: float, *, write: bool) -> None:
        kind = fcntl.LOCK_EX if write else fcntl.LOCK_SH
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LedgerError(
                        f"the privacy ledger '{self.path}' is held by another process; nobody trains until it is "
                        "free. End that process, or wait for it."
                    ) from None
                time.sleep(LOOK_SECONDS)
            except OSError as error:
                raise self._unwritable(error) from None

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False  # to open it again says so

    def _append(self, file: BinaryIO, line: bytes, link: Link) -> None:
        """Write a line behind all that was read, over what may be left of a broken write."""
        end = b"" if self._last.endswith(b"\n") else b"\n"
        file.truncate(self._size)
        file.seek(self._size)
        _write_all(file, end + line + b"\n")
        os.fsync(file.fileno())
        self._size += len(end)
        self._take(link, line + b"\n")
        assert self._head is not None
        _remembered[self._head.ledger] = self._anchor()

    def _read(self, file: BinaryIO, *, repair: bool) -> None:
        """Take in what was appended since the last look, and hold all of it against what is known."""
        try:
            file.seek(self._size - len(self._last))
            found = file.read()
        except OSError as error:
            raise self._unreadable(error) from None
        if not found.startswith(self._last):
            raise self._changed()
        rest = found[len(self._last) :]
        if self._last and not self._last.endswith(b"\n") and rest:
            if not rest.startswith(b"\n"):
                raise self._changed()
            rest, self._last, self._size = rest[1:], self._last + b"\n", self._size + 1
        *whole, end = rest.split(b"\n")
        for line in whole:
            self._parse(line, line + b"\n")
        broken = b""
        if end:  # an editor may have taken the end of the last line: whole it is all the same
            try:
                self._parse(end, end)
            except LedgerError:
                if not self._hashes:
                    raise
                broken = end
        if self._head is None:
            raise LedgerError(
                f"'{self.path}' holds nothing, not even the first line of a privacy ledger; nobody trains on it. Put "
                "the ledger back with all its charges. If it is new, remove it and make one: "
                f"`fedpeft privacy ledger --create {self.path}`."
            )
        self._hold_against_what_is_known(file, broken, self._head, repair=repair)

    def _hold_against_what_is_known(self, file: BinaryIO, broken: bytes, head: Head, *, repair: bool) -> None:
        if self._keeper not in (None, head.keeper):
            raise LedgerError(
                f"the privacy ledger '{self.path}' is a {head.keeper}'s, and no {self._keeper}'s; name another, or "
                "make one: `fedpeft privacy ledger --create NEW`."
            )
        anchor = read_anchor(self.path, head)
        if anchor is not None and anchor.count == len(self._entries) + 1 and anchor.line.encode().startswith(broken):
            # a process died as it wrote this line: it is counted, though perhaps nobody trained on it
            broken = self._restore(file, anchor.line.encode(), broken, repair=repair)
        for known_to_be in filter(None, (anchor, _remembered.get(head.ledger))):
            have, count = len(self._entries), known_to_be.count
            if have < count or self._hashes[count] != known_to_be.hash:
                what = f"holds {have} of the {count} charges that were made" if have < count else "is another copy"
                raise LedgerError(
                    f"the privacy ledger '{self.path}' {what}: lines are gone or were changed, or an older copy was "
                    f"put back. Nobody trains on it. Put back the copy that holds all {count} charges; without it, "
                    "what was spent on these rows is not known, and they must not be trained on."
                )
        # of a run nobody else writes: its anchor is ahead of whatever was trained on
        if broken and not (head.keeper == "run" and anchor is not None and anchor.count == len(self._entries)):
            raise LedgerError(
                f"the privacy ledger '{self.path}' ends in half a line, of a charge that counts and cannot be read. "
                "Nobody trains on it. Put back the copy that holds all charges, the last one included."
            )
        if anchor is None and head.ledger not in _remembered:
            self._meet(head, repair=repair)
        _remembered[head.ledger] = self._anchor()

    def _meet(self, head: Head, *, repair: bool) -> None:
        """Take a ledger as it is of which nothing is known here, unless another one was in its place."""
        if head.keeper == "site" and kept_there_before(self.path, head):
            raise LedgerError(
                f"the privacy ledger '{self.path}' is another one than was kept there, and was not made there by "
                "`fedpeft privacy ledger --create`. Nobody trains on it. Put back the one that was, with all its "
                "charges."
            )
        if repair:
            log.warning(
                "what was known of the privacy ledger '%s' is not on this machine: its %d charges are taken for all",
                self.path,
                len(self._entries),
            )
            write_anchor(self.path, head, self._anchor())

    def _restore(self, file: BinaryIO, line: bytes, broken: bytes, *, repair: bool) -> bytes:
        """Count the line that an anchor holds where it is the next; return what is then left of a broken one."""
        try:
            link = entry_link(line, len(self._hashes), self._hashes[-1])
        except ValueError:
            return broken
        if not repair:
            self._take(link, line)
            return b""
        try:
            self._append(file, line, link)
        except OSError as error:
            raise self._unwritable(error) from None
        return b""

    def _parse(self, line: bytes, as_found: bytes) -> None:
        try:
            if self._head is None:
                head, link = head_link(line)
                self._head = head
            else:
                link = entry_link(line, len(self._hashes), self._hashes[-1])
        except ValueError:
            raise self._damaged(line) from None
        self._take(link, as_found)

    def _take(self, link: Link, as_found: bytes) -> None:
        self._size += len(as_found)
        self._last = as_found
        self._hashes.append(link.hash)
        if (entry := link.entry) is not None:
            self._entries.append(entry)
            self._of_client.setdefault(entry.client, []).append(entry)
            if entry.release:
                self._releases.add((entry.run, entry.client, entry.release))

    def _anchor(self) -> Anchor:
        return Anchor(len(self._entries), self._hashes[-1])

    # --- what may be wrong with it --------------------------------------------------------------------------------

    def _missing(self) -> LedgerError:
        if self._hashes:
            return LedgerError(
                f"the privacy ledger '{self.path}' was there and is gone; nobody trains without it. Put back the copy "
                f"that holds all {len(self._entries)} charges."
            )
        return LedgerError(
            f"there is no privacy ledger '{self.path}'; nobody trains without it. If there was one, put it back with "
            "all its charges. For rows that nothing was ever trained on, make it: "
            f"`fedpeft privacy ledger --create {self.path}`."
        )

    def _unwritable(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"cannot write the privacy ledger '{self.path}': {error.strerror or error}; nobody trains without it. "
            "Make room, or name a file that can be written."
        )

    def _unreadable(self, error: OSError) -> LedgerError:
        return LedgerError(f"cannot read the privacy ledger '{self.path}': {error.strerror or error}.")

    def _changed(self) -> LedgerError:
        return LedgerError(
            f"the privacy ledger '{self.path}' was changed by something else than fedpeft since it was last read. "
            f"Nobody trains on it. Put back the copy that holds all {len(self._entries)} charges."
        )

    def _damaged(self, line: bytes) -> LedgerError:
        if self._head is None:
            if is_unchained(line):
                return LedgerError(
                    f"'{self.path}' is a privacy ledger of an earlier version, whose lines are not chained. Copy its "
                    f"charges into a new one, and name that: `fedpeft privacy ledger --create NEW --from {self.path}`."
                )
            return LedgerError(
                f"'{self.path}' is no privacy ledger: its line 1 names none. Give a run directory, or a ledger file."
            )
        return LedgerError(
            f"the privacy ledger '{self.path}' is damaged in line {len(self._hashes) + 1}: it is not the line that "
            "fedpeft wrote behind the one before it. Nobody trains on a book that cannot be read. Put back the copy "
            "that holds all charges that were made."
        )


def read_entries(path: Path) -> list[Entry]:
    """Return what a ledger holds to whoever looks, who may not be allowed to write there.

    Raises
    ------
    LedgerError
        It is damaged, older than what is known, no ledger at all, or cannot be read.
    """
    return Ledger(path).view()


def _write_all(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
