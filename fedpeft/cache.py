"""The cache folder, shared by many processes at once: locks, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

from fedpeft.errors import DataError

CACHE_VARIABLE = "FEDPEFT_CACHE_DIR"


def cache_dir() -> Path:
    """Return the folder named by the environment variable ``FEDPEFT_CACHE_DIR``, else the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else platformdirs.user_cache_path("fedpeft")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of whatever fails to be written below `path` that it is the cache, and how to move it.

    Raises
    ------
    DataError
        In place of any `OSError` or `SafetensorError` inside the block.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"cannot write to the cache '{path}': {what}. "
            f"Make room, or set {CACHE_VARIABLE} to a folder that can be written."
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, a file named like it plus ``.lock``; other processes wait.

    Raises
    ------
    DataError
        The lock's file cannot be written.
    """
    lock = FileLock(f"{path}.lock")
    with explained(path.parent):
        _make(path.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, which becomes `folder` when the block ends well and vanishes when it does not.

    Hold the lock of `folder`: whatever stood there, and what killed writers left beside it, is removed.

    Raises
    ------
    DataError
        The disk is full or the folder cannot be written.
    """
    with explained(folder):
        _make(folder.parent)
        for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        draft = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
        draft.mkdir()
        try:
            yield draft
            for path in (*draft.rglob("*"), draft):  # else a power cut may leave a name without its contents
                sync(path)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(draft, folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _make(folder: Path) -> None:
    """Make a folder of the cache; the cache itself, with rows in it, is for nobody else to read."""
    top = cache_dir()
    if folder.is_relative_to(top):
        top.parent.mkdir(parents=True, exist_ok=True)
        top.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def sync(path: Path) -> None:
    """See that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
