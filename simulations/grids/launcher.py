"""What Ray starts in place of a worker's interpreter: it asks for a fork of a process that has imported everything.

Ray runs this file as ``python launcher.py SPEC default_worker.py ...``. It imports the standard library only, and turns
into a process of no size as soon as the worker is there; see `fedpeft.simulations.grids.nursery`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import time

PATIENCE = 300.0  # seconds for all imports, on a machine that does much else


def main(spec: str, arguments: list[str]) -> None:
    """Have the nursery fork a worker, and last as long as it does."""
    connection = None
    with contextlib.suppress(OSError):  # where anything is wrong with the nursery, there is a worker still
        connection = _nursery(spec)
    if connection is None or not _forked(connection, arguments):
        os.execv(sys.executable, [sys.executable, *arguments])  # a worker that shares nothing
    # the worker holds the other end until it dies; so long must this process live, and nothing is smaller than cat
    os.dup2(connection.fileno(), 0)
    with contextlib.suppress(OSError):
        os.execvp("cat", ["cat"])
    while os.read(0, 1):
        pass


def _nursery(spec: str) -> socket.socket | None:
    """Connect to the nursery of this node, which the first worker starts; None where there can be none."""
    facts = json.loads(spec)
    folder, hatched = facts["folder"], facts.get("hatched")
    if not _is_own(folder):
        return None
    if hatched and os.path.isdir(hatched) and _is_own(hatched) and os.environ.get("RAY_JOB_ID") == facts["job"]:
        connection = _connected(os.path.join(hatched, "forks"))
        if connection is not None:
            return connection
    raylet = os.environ.get("RAY_RAYLET_PID") or str(os.getppid())
    path = os.path.join(folder, f"{raylet}.{hashlib.sha256(spec.encode()).hexdigest()[:12]}")
    with open(f"{path}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the first
        return _connected(path) or _started(path, spec)


def _is_own(folder: str) -> bool:
    """Tell whether a folder is closed to others: nobody else may say what workers are."""
    found = os.lstat(folder)  # not there on another machine
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _forked(connection: socket.socket, arguments: list[str]) -> bool:
    """Ask for a fork, and say whether it is there: not if the nursery has died."""
    order = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with contextlib.suppress(OSError):
        socket.send_fds(connection, [len(order).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(order)
        return connection.recv(1) == b"+"
    return False


def _connected(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def _started(path: str, spec: str) -> socket.socket | None:
    with contextlib.suppress(OSError):
        os.unlink(path)  # of one that was killed
    facts = json.loads(spec)
    # -P: the folder that one happens to stand in is no place to import from
    command = [sys.executable, "-P", "-m", "fedpeft.simulations.grids.nursery", path, *facts["modules"]]
    nursery = subprocess.Popen(
        command, env={**os.environ, **facts["variables"]}, stdin=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and nursery.poll() is None:
        if connection := _connected(path):
            return connection
        time.sleep(0.02)
    return None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
