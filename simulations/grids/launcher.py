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
import subprocess
import sys
import time

PATIENCE = 300.0  # seconds for all imports, on a machine that does much else


def main(spec: str, arguments: list[str]) -> None:
    """Have the nursery fork a worker, and last as long as it does."""
    folder = json.loads(spec)["folder"]
    os.makedirs(folder, mode=0o700, exist_ok=True)
    raylet = os.environ.get("RAY_RAYLET_PID") or str(os.getppid())
    path = os.path.join(folder, f"{raylet}.{hashlib.sha256(spec.encode()).hexdigest()[:12]}")
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker starts the nursery, and the others wait for it
        connection = _connected(path) or _started(path, spec)
    order = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    socket.send_fds(connection, [len(order).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(order)
    # the worker holds the other end until it dies; so long must this process live, and nothing is smaller than cat
    os.dup2(connection.fileno(), 0)
    os.execvp("cat", ["cat"])


def _connected(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def _started(path: str, spec: str) -> socket.socket:
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
    raise SystemExit("the process that workers are forked from did not start")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
