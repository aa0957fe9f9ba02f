"""Connection to Ray: an own one for as long as a simulation lasts, or one that is there already."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from fedpeft.errors import ConfigError, SimulationError

log = logging.getLogger(__name__)

STORE_BYTES = 2 * 2**30
SMALLEST_STORE_BYTES = 256 * 2**20
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "fedpeft-ray-"
LOCK = "in-use"
OWN = "local"  # Ray's word for a cluster to be started
START_TRIES = 2
RAY_ENVIRONMENT = {
    # without these Ray prints warnings about its own defaults
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # by default workers are at niceness 15: whatever else runs on the machine leaves them a thirtieth of it
    "RAY_worker_niceness": "0",
    # a worker answers Ray only when all is imported, which takes a minute on a machine that does much else
    "RAY_worker_register_timeout_seconds": "300",
    # workers begin as forks of one process: those that Ray keeps ready for others would never be used
    "RAY_prestart_worker_first_driver": "0",
}


@contextlib.contextmanager
def ray_connection(*, store_bytes: int | None = None, verbose: bool = False) -> Iterator[None]:
    """Be connected to Ray.

    A connection that this process has already is used and left as it is. Else the cluster that the environment variable
    RAY_ADDRESS names is connected to. Else Ray is started on this machine and ended, files and all, with the context.

    Ray's processes die with the THREAD that started them: the thread that enters the context must live until it leaves.

    Parameters
    ----------
    store_bytes : int, optional
        Size of an own Ray's object store; what does not fit goes to disk. 2 GiB, or what memory allows, if not given.
    verbose : bool
        Let Ray and the workers print.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {
            "log_to_driver": verbose,
            "logging_level": logging.INFO if verbose else logging.ERROR,
        }
        if not verbose:
            stack.enter_context(_no_reports())
        address = os.environ.get("RAY_ADDRESS") or OWN
        if address == OWN:
            directory = stack.enter_context(_own_directory())
            options |= {
                "include_dashboard": False,
                "object_store_memory": store_bytes or default_store_bytes(),
                "_temp_dir": str(directory),
            }
        stack.callback(ray.shutdown)
        try:
            _knock(address)
            _start(address, options)
        except (OSError, ValueError, RuntimeError) as error:
            why = str(error).strip().partition("\n")[0]
            if address == OWN:
                raise SimulationError(f"Ray cannot start: {why}; set simulation.workers = 0 to do without") from error
            raise ConfigError(
                f"RAY_ADDRESS = '{address}' cannot be connected to: {why}; unset it to run on this machine"
            ) from None
        yield


def _start(address: str, options: dict[str, Any]) -> None:
    """Start Ray or connect to it, once more where its own processes were too slow.

    Ray waits half a minute for them, whatever else the machine has to do, and says so by an exception of no kind.
    """
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(address=address, **options)
            return
        except Exception as error:
            if type(error) is not Exception:
                raise
            ray.shutdown()
            if not left:
                raise RuntimeError(str(error)) from error
            log.warning("Ray did not start in time, and is started once more")


def _knock(address: str) -> None:
    """Raise OSError where nobody listens; Ray would try for minutes."""
    if place := re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address):
        socket.create_connection((place[1], int(place[2])), timeout=10.0).close()


@contextlib.contextmanager
def _no_reports() -> Iterator[None]:
    """Keep what Ray's node process reports, such as a worker's death, off this process's output.

    Ray prints it whatever `log_to_driver` says, and the grid tells of deaths itself.
    """
    from ray._private import worker

    printer = worker.print_to_stdstream
    worker.print_to_stdstream = lambda data, *_, **__: log.debug("%s", data)
    try:
        yield
    finally:
        worker.print_to_stdstream = printer


@contextlib.contextmanager
def _own_directory() -> Iterator[Path]:
    """Make a folder for Ray's sockets, logs and spilled objects that is gone afterwards.

    A process that is killed leaves its folder, and nobody else would ever remove it; so the next one does. A lock tells
    the folders in use, and a process loses its locks however it ends.
    """
    # short, because the paths of sockets are limited
    parent = Path(os.environ.get("RAY_TMPDIR") or ("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()))
    for left in parent.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), left.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (directory / f"{LOCK}.new").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (directory / f"{LOCK}.new").rename(directory / LOCK)  # nobody sees the lock before it is held
            # one level down, because Ray opens the folder that it is given to everyone
            yield directory / "r"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def default_store_bytes() -> int:
    """Return 2 GiB, or less on a machine with little memory or little shared memory."""
    size = min(STORE_BYTES, int(0.3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    size = max(size, SMALLEST_STORE_BYTES)
    if not SHARED_MEMORY.is_dir():
        return size
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= size:
        return size
    if free >= 2 * SMALLEST_STORE_BYTES:
        return int(0.9 * free)
    # Ray takes files in its folder instead
    log.warning("%s has only %d MiB free: arrays go through files, which is slower", SHARED_MEMORY, free // 2**20)
    return size


def check_gpus(workers: int, gpus_per_worker: float) -> None:
    """Raise ConfigError where Ray would wait for GPUs for ever."""
    have = ray.cluster_resources().get("GPU", 0.0)
    if workers * gpus_per_worker > have:
        raise ConfigError(
            f"simulation.gpus_per_worker = {gpus_per_worker:g} with {workers} workers needs "
            f"{workers * gpus_per_worker:g} GPUs, and Ray sees {have:g}; lower it, or simulation.workers"
        )


def cpus_per_worker(workers: int, threads: int) -> float:
    """Return how many of Ray's CPUs a worker should claim, such that all workers find a place.

    Claims spread workers over a cluster's nodes. On a single node they could only make workers wait, and having fewer
    cores than workers is no reason to: then they claim nothing.
    """
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        for cpus in (threads, 1):
            if sum(int(cores // cpus) for cores in nodes) >= workers:
                return cpus
    return 0
