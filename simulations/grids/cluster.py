"""Connection to Ray: an own one for as long as a simulation lasts, or one that is there already; and its nodes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedpeft.errors import ConfigError, FedpeftError, SimulationError
from fedpeft.runs.checks import Finding, State
from fedpeft.runs.machine import Footprint, Machine, here
from fedpeft.simulations.grids import host

log = logging.getLogger(__name__)

STORE_BYTES = 2 * 2**30
SMALLEST_STORE_BYTES = 256 * 2**20
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "fedpeft-ray-"
LOCK = "in-use"
OWN = "local"  # Ray's word for a cluster to be started
START_TRIES = 2
ANSWER_SECONDS = 60.0  # that a node may take to say what it has: a process is started there, which imports fedpeft
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
def ray_connection(
    *, address: str | None = None, store_bytes: int | None = None, verbose: bool = False
) -> Iterator[None]:
    """Be connected to Ray.

    A connection that this process has already is used and left as it is. Else the cluster that is named is connected
    to. Else Ray is started on this machine and ended, files and all, with the context.

    Ray's processes die with the THREAD that started them: the thread that enters the context must live until it leaves.

    Parameters
    ----------
    address : str, optional
        The cluster's, such as ``10.0.0.1:6379``, or ``auto`` for the one that this machine is a node of. If not given,
        that of the environment variable RAY_ADDRESS.
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
        named, address = named_address(address)
        beside = host.begun() if address == OWN and store_bytes is None else None
        if beside is not None:
            stack.callback(host.end)
        if beside is not None and beside.wait():
            address = beside.address
        elif address == OWN:
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
                f"{named} = '{address}' cannot be connected to: {why}; unset it to run on this machine"
            ) from None
        yield


def named_address(address: str | None) -> tuple[str, str]:
    """Return who names the cluster that is connected to, and its address; the last is ``local`` for one to be started.

    Parameters
    ----------
    address : str, optional
        What the configuration says.
    """
    if address:
        return "simulation.address", address
    return "RAY_ADDRESS", os.environ.get("RAY_ADDRESS") or OWN


def ray_starts() -> Finding:
    """Tell whether Ray starts, or can be connected to, and how soon."""
    begun = time.monotonic()
    try:
        with ray_connection():
            seen = f"up after {time.monotonic() - begun:.1f} s, with {len(alive())} node"
    except FedpeftError as error:
        return Finding("Ray", State.BROKEN, str(error), "simulation.workers=0 does without")
    return Finding("Ray", State.OK, seen)


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
    for left in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_left(left)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (directory / f"{LOCK}.new").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (directory / f"{LOCK}.new").rename(directory / LOCK)  # nobody sees the lock before it is held
            # one level down, because Ray opens the folder that it is given to everyone
            yield directory / "r"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_left(folder: Path) -> None:
    """Remove a folder whose process is gone. The names are anybody's to take: what is not our own is left alone."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(lock).st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def own_folder() -> Path | None:
    """Return the folder of the Ray that `ray_connection` has started in or beside this process, closed to others.

    None of a Ray that somebody else started.
    """
    beside = host.begun()
    if beside is not None and beside.address:
        return beside.folder
    node = ray._private.worker._global_node
    if node is None or not node.is_head():
        return None
    folder = Path(node.get_temp_dir_path()).parent
    return folder if folder.name.startswith(PREFIX) else None


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


@dataclass(frozen=True)
class Node:
    """One machine of those that workers may be on.

    Parameters
    ----------
    name : str
        Ray's id of it; empty for this machine before Ray has started.
    machine : Machine
        What it had when it was first seen.
    cpus : int
        Ray's CPUs.
    gpus : int
        GPUs that Ray gives out.
    drives : bool
        Whether this process runs there too.
    """

    name: str
    machine: Machine
    cpus: int
    gpus: int
    drives: bool


@dataclass(frozen=True)
class Sizing:
    """How many workers there are, and why.

    Parameters
    ----------
    workers : int
        0 where all is done in this process.
    gpus_per_worker : float
        Of each; 0 for none.
    why : str
        In a few words.
    footprint : Footprint, optional
        What one of them is taken to need.
    """

    workers: int
    gpus_per_worker: float = 0.0
    why: str = ""
    footprint: Footprint | None = None

    def __str__(self) -> str:
        if not self.workers:
            return f"none: {self.why}"
        share = f" with {self.gpus_per_worker:.3g} GPU each" if self.gpus_per_worker else ""
        return f"{self.workers} on Ray{share}: {self.why}"

    def to_dict(self) -> Mapping[str, Any]:
        """Return plain data."""
        need = None if self.footprint is None else self.footprint.to_dict()
        return {
            "workers": self.workers,
            "gpus_per_worker": self.gpus_per_worker,
            "why": self.why,
            **({} if need is None else {"footprint": need}),
        }


class Sizer(Protocol):
    """Who decides how many workers there are."""

    def fit(self, nodes: Sequence[Node], most: int | None = None) -> Sizing:
        """Return the workers for these nodes.

        Parameters
        ----------
        nodes : sequence of Node
            At least one.
        most : int, optional
            Clients that are at work at a time, at most.
        """

    def learn(self, footprint: Footprint) -> None:
        """Take in what a worker has needed."""


@dataclass(frozen=True)
class Fixed:
    """A `Sizer` that was told the number."""

    workers: int
    gpus_per_worker: float = 0.0

    def fit(self, nodes: Sequence[Node], most: int | None = None) -> Sizing:
        """Return the number, whatever there is."""
        return Sizing(self.workers, self.gpus_per_worker, "as asked")

    def learn(self, footprint: Footprint) -> None:
        """Learn nothing."""


def this_node() -> Node:
    """Describe this machine as Ray will see it when it is started here."""
    machine = here()
    return Node("", machine, machine.cores, len(machine.gpus), drives=True)


def nodes(known: Sequence[Node] = ()) -> list[Node]:
    """Describe the nodes of the cluster that this process is connected to.

    Each but this process's own is asked by a task that runs there, since the cores and the memory that a container
    leaves, and the memory of GPUs, are not for Ray to know.

    Parameters
    ----------
    known : sequence of Node
        Those that need not be asked again: what they have left now would count workers twice.
    """
    own = ray.get_runtime_context().get_node_id()
    before = {node.name: node for node in known}
    alive = {str(node["NodeID"]): node["Resources"] for node in ray.nodes() if node["Alive"]}
    asked = {name: _ask(name) for name in alive if name not in before and name != own}
    found = []
    for name, resources in alive.items():
        if name in before:
            found.append(before[name])
            continue
        cpus, gpus = (int(resources.get(kind, 0.0)) for kind in ("CPU", "GPU"))
        memory = int(resources.get("memory", 0.0))
        machine = Machine(cpus, memory, memory) if name in asked else here()
        with contextlib.suppress(RayError, GetTimeoutError):  # it left again, or lacks fedpeft, as its workers will say
            machine = ray.get(asked[name], timeout=ANSWER_SECONDS) if name in asked else machine
        found.append(Node(name, machine, cpus, gpus, drives=name == own))
    return found


def _ask(node: str) -> Any:
    """Have a node describe itself."""
    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(_describe).options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote()


def _describe() -> Machine:
    """Describe the machine of a task; Ray may have hidden the GPUs from it, since it has claimed none."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return here()


def alive() -> frozenset[str]:
    """Return the ids of the nodes that are there now."""
    return frozenset(str(node["NodeID"]) for node in ray.nodes() if node["Alive"])


def check_gpus(workers: int, gpus_per_worker: float) -> None:
    """Raise ConfigError where Ray would wait for GPUs for ever."""
    have = ray.cluster_resources().get("GPU", 0.0)
    if workers * gpus_per_worker > have:
        raise ConfigError(
            f"simulation.gpus_per_worker = {gpus_per_worker:g} with {workers} workers needs "
            f"{workers * gpus_per_worker:g} GPUs, and Ray sees {have:g}; lower it, or simulation.workers"
        )


def cpus_per_worker(workers: int, threads: int, gpus_per_worker: float = 0.0, *, grows: bool = False) -> float:
    """Return how many of Ray's CPUs a worker should claim, such that all workers find a place.

    Claims spread workers over a cluster's nodes. On a single node they could only make workers wait, and having fewer
    cores than workers is no reason to: then they claim nothing. But where nodes may join, the first one's CPUs must not
    look free to those that are hired later.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1 or grows:
        for cpus in (threads, 1):
            places = [int(node.get("CPU", 0.0) // cpus) for node in nodes]
            if gpus_per_worker:
                shares = [int(node.get("GPU", 0.0) / gpus_per_worker + 1e-6) for node in nodes]
                places = [min(pair) for pair in zip(places, shares, strict=True)]
            if sum(places) >= workers:
                return cpus
    return 0
