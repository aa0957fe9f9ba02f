"""The process that Ray's workers on this machine are forked from.

A worker's imports are most of what it holds: torch, transformers, PEFT and what they need take 370 MB in each process
that imports them, and seconds of processor time. A fork has them at once, and shares with all others the pages that
nobody writes to. The nursery never speaks to Ray, makes no thread and computes nothing, so that a fork finds everything
as after an import of its own.

Ray starts `launcher` where it would start an interpreter; that sends here what the worker is to be: arguments,
environment, folder, and its standard streams.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray._raylet import setproctitle  # type: ignore[attr-defined]

from fedpeft.simulations.grids import launcher

LOOK = 1.0  # seconds until it is seen that Ray is gone


def executable(folder: Path, modules: Sequence[str], variables: Mapping[str, str]) -> str:
    """Return the command by which Ray starts a worker, as its runtime environment takes it under ``py_executable``.

    Parameters
    ----------
    folder : Path
        Closed to others: whoever could write there would say what workers are.
    modules : sequence of str
        What workers need, imported once.
    variables : mapping of str to str
        Environment variables that must stand before.
    """
    spec = {"folder": str(folder), "modules": list(modules), "variables": dict(variables)}
    return shlex.join([sys.executable, "-I", "-S", str(launcher.__file__), json.dumps(spec)])


def main(path: Path, modules: Sequence[str]) -> None:
    """Import, then fork whoever is asked for until Ray's node process is gone.

    Parameters
    ----------
    path : Path
        The socket to listen at; the name begins with the id of Ray's node process.
    modules : sequence of str
        What to import.
    """
    raylet = int(path.name.partition(".")[0])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that a dead worker leaves nothing behind
    os.umask(0o077)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1024)  # who asks meanwhile waits
        try:
            _import(modules)
            listener.settimeout(LOOK)
            while _lives(raylet):
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    with connection:
                        _serve(listener, connection)
        finally:
            for left in (path, path.with_name(f"{path.name}.lock")):
                left.unlink(missing_ok=True)


def _import(modules: Sequence[str]) -> None:
    setproctitle("fedpeft: what workers are forked from")  # else a fork could not call itself what it is
    gc.disable()
    for name in modules:
        # the worker imports it once more, and tells of the error
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # else the first collection in a worker writes to every page
    gc.enable()


def _serve(listener: socket.socket, connection: socket.socket) -> None:
    """Fork a worker as one connection asks for it."""
    order, streams = _read(connection)
    if order is not None and os.fork() == 0:
        listener.close()
        connection.sendall(b"+")
        _become(order, streams)
    for stream in streams:
        os.close(stream)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # another user's
    except OSError:
        return False
    return True


def _read(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Return what a worker is to be, and its standard streams; None of one that nobody waits for any more."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    text = b""
    while size and len(text) < int.from_bytes(size, "big"):
        if not (more := connection.recv(2**20)):
            break
        text += more
    try:
        gone = not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        gone = False
    return None if gone else json.loads(text), streams


def _become(order: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Be the worker, and never return. The connection stays open: that it closes is how the launcher sees the end."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        random.seed()  # names that are drawn must not be those of another fork
        sys.argv = list(order["arguments"])
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
