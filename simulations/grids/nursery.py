"""The process that Ray's workers on this machine are forked from.

A worker's imports are most of what it holds: torch, transformers, PEFT and what they need take 370 MB in each process
that imports them, and seconds of processor time. A fork has them at once, and shares with all others the pages that
nobody writes to. The nursery never speaks to Ray, makes no thread and computes nothing, so that a fork finds everything
as after an import of its own.

A command imports the same itself: one that has just begun forks the nursery (`hatch`), and nothing is imported twice.
Else the first worker starts one.

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
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedpeft import allocation
from fedpeft.deferred import defer
from fedpeft.simulations.grids import launcher

TITLE = "fedpeft: what workers are forked from"
LOOK = 1.0  # seconds until it is seen that Ray, or the command, is gone
PREFIX = "fedpeft-nursery-"  # of the folder of one that a command has forked
SOCKET = "forks"
ALLOCATOR = "jemalloc_bg_thd"

# not the app, where that is another's: nobody knows what its import does
PRELOADED = (
    *("ray._private.node", "ray._private.workers.default_worker", "fedpeft.simulations.grids.transport"),
    *("fedpeft.clients.app", "fedpeft.strategies.rounds.scoring", "fedpeft.data.schemes:partitioners"),
)
# Ray reads this as it is imported: whose worker a process is, and the process that it is to end with. Of the Ray beside
# a command (`host`) the command is the second job; a launcher of another's does not ask for a fork of this process
JOB = {"RAY_JOB_ID": "02000000"}

_hatched: Path | None = None  # folder of the one that this process has forked


def executable(folder: Path, modules: Sequence[str], variables: Mapping[str, str]) -> str:
    """Return the command by which Ray starts a worker, as its runtime environment takes it under ``py_executable``.

    Parameters
    ----------
    folder : Path
        Closed to others: whoever could write there would say what workers are.
    modules : sequence of str
        What workers need, imported once; as ``module:function`` where that imports more.
    variables : mapping of str to str
        Environment variables that must stand before.
    """
    spec: dict[str, Any] = {"folder": str(folder), "modules": list(modules), "variables": dict(variables)}
    if _hatched is not None and {*PRELOADED} <= {*modules}:  # what it has not imported, each fork does
        spec.update(hatched=str(_hatched), job=JOB["RAY_JOB_ID"])
    return shlex.join([sys.executable, "-I", "-S", str(launcher.__file__), json.dumps(spec)])


def hatch() -> bool:
    """Import what workers need, and fork the nursery; False where this process is no longer as it began.

    It has to have one thread and to have computed nothing, as a command that has read its options. What else it does
    may be done afterwards: a fork takes along what there is.
    """
    global _hatched
    if _hatched is not None or sys.platform != "linux" or not _alone() or "ray._raylet" in sys.modules:
        return False
    os.environ.update(JOB, RAY_RAYLET_PID=str(os.getpid()))
    try:
        _import(PRELOADED)
    finally:
        for name in (*JOB, "RAY_RAYLET_PID"):
            del os.environ[name]
    if not _alone():
        return False
    driver, folder = os.getpid(), None
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / SOCKET))
            listener.listen(1024)
            if os.fork() == 0:
                _brood(listener, driver, folder)
    except OSError:  # a full disk, a path too long for a socket, no more processes: the first worker starts one
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return False
    _hatched = folder
    return True


def _alone() -> bool:
    """Tell whether this process has one thread, but for that of Arrow's allocator, which prepares itself for forks."""
    try:
        others = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
        return all(task.joinpath("comm").read_text(encoding="utf-8").strip() == ALLOCATOR for task in others)
    except OSError:
        return False


def _brood(listener: socket.socket, driver: int, folder: Path) -> NoReturn:
    """Be the nursery of a command, and end with it."""
    try:
        os.setsid()
        _name()
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)  # a command's output has its end when the command has
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) != listener.fileno():
                with contextlib.suppress(OSError):
                    os.close(int(name))
        allocation.few_arenas()
        _attend(listener, lambda: os.getppid() == driver)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


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
    os.umask(0o077)
    defer(besides=modules)
    _name()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1024)  # who asks meanwhile waits
        try:
            _import(modules)
            _attend(listener, lambda: _lives(raylet))
        finally:
            for left in (path, path.with_name(f"{path.name}.lock")):
                left.unlink(missing_ok=True)


def _name() -> None:
    from ray._raylet import setproctitle  # type: ignore[attr-defined]

    setproctitle(TITLE)  # else a fork could not call itself what it is


def _attend(listener: socket.socket, lives: Callable[[], bool]) -> None:
    """Fork whoever is asked for, as long as somebody may ask."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that a dead worker leaves nothing behind
    os.umask(0o077)
    listener.settimeout(LOOK)
    while lives():
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            with connection:
                _serve(listener, connection)


def _import(modules: Sequence[str]) -> None:
    gc.disable()
    for name in modules:
        module, _, function = name.partition(":")
        # the worker imports it once more, and tells of the error
        with contextlib.suppress(Exception):
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
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
