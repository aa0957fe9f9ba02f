"""The book of what was spent: one JSON object a line, appended and synced to disk before anybody trains.

A charge is written for ALL steps of a message before the first of them is made. So whatever is killed, and whenever,
the book never holds less than what was released. A charge that names its release (the hash of everything that a seeded
training depends on) is written once, however often the very same numbers are computed again; one that names none is
written every time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedpeft.errors import LedgerError
from fedpeft.privacy.accounting import Charge

LEDGER = "ledger.jsonl"  # in a run directory
LOCK_SECONDS = 30.0  # to wait for another process that writes a line


@dataclass(frozen=True)
class Entry:
    """One charge.

    Parameters
    ----------
    run : str
        The run that it was for.
    client : str
        Whose rows were used; under client-level privacy `EVERYBODY`.
    round : int
        From 1.
    noise_multiplier : float
        See `fedpeft.privacy.accounting.Charge`.
    sample_rate : float
        See there.
    steps : int
        All planned steps of the message.
    release : str
        Hash of what a seeded training depends on; empty where no two trainings are the same.
    data : str
        Fingerprint of the rows, in a site's own ledger. Others would learn from it: who knows all rows but one may try
        what the last one is.
    """

    run: str
    client: str
    round: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    release: str = ""
    data: str = ""

    @property
    def charge(self) -> Charge:
        """What it costs."""
        return Charge(self.noise_multiplier, self.sample_rate, self.steps)


EVERYBODY = "*"


class Ledger:
    """An append-only file of entries.

    Parameters
    ----------
    path : Path
        The file; made with its folder at the first charge.

    Notes
    -----
    Several processes may hold the same file open: each takes a lock and reads what the others wrote before it looks
    at a budget and charges, see `held`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # whatever links lead to a file, it has one lock
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=LOCK_SECONDS)
        self._entries: list[Entry] = []
        self._of_client: dict[str, list[Entry]] = {}  # a run looks at one client's for every message
        self._releases: set[tuple[str, str, str]] = set()
        self._size = 0  # bytes of whole lines that were read

    @contextlib.contextmanager
    def held(self) -> Iterator[Ledger]:
        """Keep other processes out, and know all that they wrote.

        Raises
        ------
        LedgerError
            The file is damaged, cannot be read, or another process holds it for too long.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise LedgerError(
                f"the privacy ledger '{self.path}' is held by another process; nobody trains until it is free. "
                "End that process, or wait for it."
            ) from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._read()
            yield self
        finally:
            self._lock.release()

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
            if self.is_charged(entry):
                return False
            line = (json.dumps(asdict(entry), allow_nan=False) + "\n").encode()
            try:
                with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                    file.truncate(self._size)  # half a line, of a process that died before it could train
                    file.seek(self._size)
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                _sync_folder(self.path.parent)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, self._size)
                raise self._unwritable(error) from None
            self._take(entry, len(line))
            return True

    def _unwritable(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"cannot write the privacy ledger '{self.path}': {error.strerror or error}; nobody trains without it. "
            "Make room, or name a folder that can be written."
        )

    def _read(self) -> None:
        """Take in what was appended since the last look."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._size)
                new = file.read()
        except FileNotFoundError:
            if self._size:
                raise LedgerError(
                    f"the privacy ledger '{self.path}' was there and is gone; put it back from a copy."
                ) from None
            return
        except OSError as error:
            raise self._unwritable(error) from None
        whole, _, _ = new.rpartition(b"\n")  # what follows was never finished, so that nobody trained on it
        for line in whole.split(b"\n") if whole else ():
            self._take(self._parsed(line), len(line) + 1)

    def _parsed(self, line: bytes) -> Entry:
        try:
            found: dict[str, Any] = json.loads(line)
            entry = Entry(**{field.name: found[field.name] for field in fields(Entry)})
            if not (entry.noise_multiplier >= 0 and 0 < entry.sample_rate <= 1 and entry.steps >= 0):
                raise ValueError(line)
        except (ValueError, KeyError, TypeError):
            raise LedgerError(
                f"the privacy ledger '{self.path}' is damaged behind byte {self._size}; nobody trains on a book that "
                "cannot be read. Put it back from a copy."
            ) from None
        return entry

    def _take(self, entry: Entry, size: int) -> None:
        self._entries.append(entry)
        self._of_client.setdefault(entry.client, []).append(entry)
        self._size += size
        if entry.release:
            self._releases.add((entry.run, entry.client, entry.release))


def read_entries(path: Path) -> list[Entry]:
    """Return what a ledger holds without locking it: whoever looks may not be allowed to write there.

    Raises
    ------
    LedgerError
        It is damaged, no ledger at all, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            first = file.readline()
    except OSError as error:
        raise LedgerError(f"cannot read the privacy ledger '{path}': {error.strerror or error}.") from None
    if _is_foreign(first):
        raise LedgerError(
            f"'{path}' is no privacy ledger: line 1 has no 'noise_multiplier'. Give a run directory, or a ledger file."
        )
    ledger = Ledger(path)
    ledger._read()
    return list(ledger._entries)


def _is_foreign(line: bytes) -> bool:
    """Tell whether a whole line is of a file of another kind, such as a run's metrics, rather than a damaged charge."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return False
    return isinstance(found, dict) and "noise_multiplier" not in found


def _sync_folder(folder: Path) -> None:
    """See that a new file's name is on the disk as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
