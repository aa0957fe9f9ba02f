"""One process a run directory: a lock that the system lets go of however the process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Self

from fedpeft.errors import RunDirectoryError
from fedpeft.runs.files import open_own

LOCK_FILE = ".lock"
PATIENCE, LOOK_SECONDS = 0.5, 0.01  # for whoever only looks whether it is held
UNABLE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # file systems without locks: nobody can be kept out


class RunLock:
    """The right to write into a run directory, as long as this process lives or until it is released.

    Parameters
    ----------
    path : Path
        The run directory, which is there.

    Raises
    ------
    RunDirectoryError
        Another process has it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = open_own(path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
            _take(self._descriptor)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            who = f"process {holder}" if _is_alive(holder) else "another process"
            raise RunDirectoryError(
                f"'{path}' is being written by {who}; wait for it or end it, or give another --out."
            ) from None
        except OSError as error:
            if error.errno not in UNABLE:
                if self._descriptor >= 0:
                    os.close(self._descriptor)
                raise RunDirectoryError(f"cannot write the run directory '{path}': {error.strerror or error}") from None
        with contextlib.suppress(OSError):  # said to whoever comes second; the lock holds without it
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others write; a second call changes nothing."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # whoever finds it held from now on is not told of this process
                os.truncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1


def _take(descriptor: int) -> None:
    """Lock a file that somebody may be looking at: `is_held` has it for a moment, a run until its end."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(LOOK_SECONDS)
        else:
            return


def _is_alive(process: str) -> bool:
    """Tell whether there is a process of this number; a file may hold that of one that is gone."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return int(process) > 0


def is_held(path: Path) -> bool | None:
    """Tell whether a process writes into a run directory; None where that cannot be known."""
    try:
        descriptor = os.open(path / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False
