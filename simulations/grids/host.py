"""Ray in a process of its own, which a command starts before it imports anything.

Ray takes seconds to start, most of them waiting, and so do a command's imports; but a process that has started Ray must
not be forked any more, as the nursery is (`fedpeft.simulations.grids.nursery`). So Ray starts beside the command, which
connects to it. It ends with the command, however that ends: the pipe between them closes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROCESS = "fedpeft.simulations.grids.hosting"  # what it runs
CLOSING = 10.0  # seconds that Ray may take to end


class Host:
    """Ray's process, seen from the command.

    Attributes
    ----------
    address : str
        Where Ray is; empty until `wait` has returned True.
    folder : Path
        Ray's own, see `fedpeft.simulations.grids.cluster.own_folder`.
    """

    def __init__(self) -> None:
        self.address, self.folder = "", Path()
        # -P: the folder that one happens to stand in is no place to import from
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-P", "-m", PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the command to hear
        )

    def wait(self) -> bool:
        """Wait until Ray is up; False where it is not, and has to be started anew."""
        if self._process is None or self._process.stdout is None:
            return False
        try:
            facts: dict[str, Any] = json.loads(self._process.stdout.readline())
        except ValueError:  # it has died
            self.close()
            return False
        self.address, self.folder = facts["address"], Path(facts["folder"])
        return True

    def close(self) -> None:
        """Let Ray end, and return at once; this process ends after it."""
        process, self._process, self.address = self._process, None, ""
        if process is not None:
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
            atexit.register(_wait, process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(CLOSING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_begun: Host | None = None


def begin() -> None:
    """Begin to start a Ray for this process alone, and return at once."""
    global _begun
    if _begun is None and sys.platform == "linux":
        with contextlib.suppress(OSError):  # then Ray starts when it is needed, and says what is wrong
            _begun = Host()


def begun() -> Host | None:
    """Return the Ray that this process has begun to start, if it has, and nobody has ended it."""
    return _begun


def end() -> None:
    """End it."""
    global _begun
    host, _begun = _begun, None
    if host is not None:
        host.close()
