"""Hidden states of rows on disk: written once, mapped by whoever needs them, never more than a limit.

All states that depend on the same base, blocks and arithmetic lie in one folder, named by the fingerprint of these, in
files of safetensors with many rows each. A file is written beside its place, synced and then renamed: a killed writer
leaves nothing half, and what it had not written yet is computed again. Nobody need wait for anybody: a row that two
processes compute at once is the same bytes twice.

Whether a row is here changes no result, since who computes it anew gets the same bytes; so what fits is kept, in the
order in which rows come.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpeft.cache import locked
from fedpeft.errors import DataError

FILE_BYTES = 16 * 2**20  # of states in memory, before they are written to a file
LEAST_BYTES = 256 * 2**10  # fewer than this wait for more, where a turn ends
MOST, SHARE = 10e9, 0.2  # the limit where none is given: bytes, and of the free disk
RESERVE = 2**30  # bytes of the disk that are always left free
STALE = 3600.0  # seconds after which a folder that nobody uses may go, and a draft has no writer any more
IN_USE = ".in-use"

_Place = tuple[Tensor, int, int]  # a mapped file's states, and where those of a row begin and how many they are


class HiddenStates:
    """States of rows by their keys, of one fingerprint.

    Parameters
    ----------
    folder : Path
        Where they lie; folders beside it hold those of other fingerprints, and count towards the limit.
    limit : float, optional
        Bytes of all folders together; `default_limit` if not given.

    Attributes
    ----------
    full : bool
        Whether there was no room, or the disk refused: rows that are not here are computed each time.
    waiting : int
        Bytes that are not on disk yet.
    """

    def __init__(self, folder: Path, limit: float | None = None) -> None:
        self.folder, self.limit, self.full = folder, limit, False
        self._rows: dict[bytes, _Place] = {}
        self._waiting: dict[bytes, Tensor] = {}
        self.waiting = 0
        self._read: set[str] = set()
        self._seen = -1

    def get(self, key: bytes) -> Tensor | None:
        """Return a row's states; not to be written to."""
        if (place := self._rows.get(key)) is None:
            return self._waiting.get(key)
        states, start, length = place
        return states[start : start + length]

    def put(self, key: bytes, states: Tensor) -> None:
        """Keep a row's states, if there is room."""
        if self.full or key in self._waiting:
            return
        self._waiting[key] = states
        self.waiting += states.nbytes
        if self.waiting >= FILE_BYTES:
            self.publish()

    def refresh(self) -> None:
        """Map what others have written since the last look."""
        try:
            seen = self.folder.stat().st_mtime_ns
        except OSError:
            return
        if seen == self._seen:
            return
        self._seen = seen
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._read:
                self._read.add(path.name)
                self._rows.update(_rows_of(path))

    def settle(self) -> None:
        """Write what is waiting, if it is worth a file: a turn is over, and others may go on with these rows."""
        if self.waiting >= LEAST_BYTES:
            self.publish()
        with contextlib.suppress(OSError):
            os.utime(self.folder / IN_USE)

    def publish(self) -> None:
        """Write what is waiting to a file of its own."""
        if not self._waiting:
            return
        root = self.folder.parent
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / "states"):
                self.full = self.full or not self._make_room(self.waiting)
                if not self.full:
                    self._write()
        except (OSError, SafetensorError, DataError):  # a cache that cannot be written is merely not used
            self.full = True
        self._waiting.clear()
        self.waiting = 0

    def _write(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / IN_USE).touch()
        keys, states = list(self._waiting), list(self._waiting.values())
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1),
            "lengths": torch.tensor([len(row) for row in states]),
            "states": torch.cat(states),
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        draft = path.with_suffix(".draft")
        try:
            save_file(tensors, draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        self._read.add(path.name)
        self._rows.update(_rows_of(path))

    def _make_room(self, more: int) -> bool:
        """Tell whether so many bytes may be written, after states of other fingerprints that nobody uses are gone."""
        root = self.folder.parent
        held = {folder: sum(size for _, size in _files(folder)) for folder in root.iterdir() if folder.is_dir()}
        limit = default_limit(root, sum(held.values())) if self.limit is None else self.limit
        now = time.time()
        for folder in [self.folder, *held]:
            for path, _ in _files(folder, ".draft"):
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > STALE:
                        path.unlink()
        for folder in sorted(held.keys() - {self.folder}, key=_last_used):
            if _fits(root, sum(held.values()), more, limit):
                return True
            if now - _last_used(folder) > STALE:
                shutil.rmtree(folder, ignore_errors=True)
                del held[folder]
        return _fits(root, sum(held.values()), more, limit)


def default_limit(root: Path, held: int = 0) -> float:
    """Return how many bytes all states may take where nobody says: 10 GB, or a fifth of what is free, if that is less.

    Parameters
    ----------
    root : Path
        Where they lie, or will.
    held : int
        Bytes of those that are there already.
    """
    while not root.exists():
        root = root.parent
    return min(MOST, SHARE * (shutil.disk_usage(root).free + held))


def _fits(root: Path, held: int, more: int, limit: float) -> bool:
    return held + more <= limit and shutil.disk_usage(root).free - more >= RESERVE


def _files(folder: Path, suffix: str = ".safetensors") -> Iterator[tuple[Path, int]]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.endswith(suffix):
                with contextlib.suppress(OSError):
                    yield Path(entry.path), entry.stat().st_size


def _last_used(folder: Path) -> float:
    try:
        return (folder / IN_USE).stat().st_mtime
    except OSError:
        return 0.0


def _rows_of(path: Path) -> dict[bytes, _Place]:
    """Return where a mapped file's rows are; none of a file that is damaged, or gone."""
    try:
        held = load_file(path)
        keys, lengths, states = held["keys"].numpy(), held["lengths"], held["states"]
        starts = lengths.cumsum(0) - lengths
        places = zip(keys, starts.tolist(), lengths.tolist(), strict=True)
        return {bytes(key): (states, start, length) for key, start, length in places}
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError):
        return {}
