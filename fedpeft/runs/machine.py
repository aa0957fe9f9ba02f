"""What a run is made with: software, hardware, and how much of the hardware this process may use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PACKAGES = (
    *("fedpeft", "torch", "transformers", "peft", "opacus", "flwr", "ray"),
    *("datasets", "flwr-datasets", "numpy", "safetensors"),
    *("bitsandbytes", "torchao"),
)
ROOT = Path("/")
UNLIMITED = 2**60  # bytes; version 1 of control groups writes a number near 2^63 where there is no limit
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and either of both under Windows
PROCESS = Path("/proc/self")
NEWS = 1.02  # of the peak so far, that a peak must be to be news
CUDA_CONTEXT = 600 * 2**20  # bytes that a process takes of a GPU beside its tensors; NVIDIA's are about half a gigabyte


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def source_revision() -> str | None:
    """Return the git commit that this package is run from, with ``+`` if files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    ask = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*ask, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", check=True, timeout=10
        ).stdout.strip()
        dirty = subprocess.run(
            [*ask, "status", "--porcelain"], capture_output=True, encoding="utf-8", check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if dirty else "")


def environment() -> dict[str, Any]:
    """Describe software and hardware."""
    found = here()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "usable_cores": found.cores,
        "memory": found.memory,
        "gpus": [gpu.name for gpu in found.gpus],
        "packages": versions(),
        "source_revision": source_revision(),
    }


# --- what there is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees.

    Parameters
    ----------
    name : str
        Its maker's name for it.
    memory, free : int
        Bytes that it has, and that nobody uses; 0 where that cannot be told.
    driver : str
        Version of the driver.
    """

    name: str
    memory: int = 0
    free: int = 0
    driver: str = ""


@dataclass(frozen=True)
class Machine:
    """What of a machine a process may use.

    Parameters
    ----------
    cores : int
        Cores, of those that the operating system and a container's quota leave.
    memory, free : int
        Bytes of memory at most, and those that could be taken now.
    gpus : tuple of Gpu
        In the order of their numbers.
    limits : tuple of str
        What holds it back from the whole machine, in words.
    """

    cores: int
    memory: int
    free: int
    gpus: tuple[Gpu, ...] = ()
    limits: tuple[str, ...] = ()


def here() -> Machine:
    """Describe the machine that this process runs on."""
    memory, free, memory_limit = usable_memory()
    cores, core_limit = usable_cores()
    limits = tuple(limit for limit in (core_limit, memory_limit) if limit is not None)
    return Machine(cores, memory, free, visible_gpus(), limits)


def usable_cores(root: Path = ROOT) -> tuple[int, str | None]:
    """Return how many cores this process may use, at least 1, and what limits it.

    Parameters
    ----------
    root : Path
        Where the file systems ``proc`` and ``sys`` are.
    """
    held = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = None if held == (os.cpu_count() or held) else f"its affinity leaves {held} of {os.cpu_count()} cores"
    quotas = [share for share in map(_quota, control_groups("cpu", root)) if share is not None]
    if quotas and min(quotas) < held:
        held, limit = max(1, int(min(quotas))), f"a control group's quota leaves {min(quotas):g} cores"
    return held, limit


def usable_memory(root: Path = ROOT) -> tuple[int, int, str | None]:
    """Return how many bytes of memory this process may use, how many are left, and what limits it.

    What a control group holds as a cache of files counts as left: the kernel drops it when memory is asked for.

    Parameters
    ----------
    root : Path
        Where the file systems ``proc`` and ``sys`` are.
    """
    known = {name: count * 1024 for name, count in _numbers(root / "proc/meminfo").items()}
    memory = known.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, limit = known.get("MemAvailable", memory), None
    for group in control_groups("memory", root):
        most = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if most is None or most >= min(UNLIMITED, memory):
            continue
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        files = _numbers(group / "memory.stat")
        cached = files.get("total_inactive_file", files.get("inactive_file", 0))
        memory, limit = most, f"a control group's limit leaves {most / 1e9:.3g} GB of memory"
        free = min(free, max(0, most - used + cached))
    return memory, free, limit


def control_groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in, of either version, the innermost first.

    A container may see its own group as the root of all, whatever the path that it is told; so the root comes last.

    Parameters
    ----------
    controller : str
        What is limited, ``cpu`` or ``memory``.
    root : Path
        Where the file systems ``proc`` and ``sys`` are.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            base = next((base for base in (mounts / controllers, mounts / controller) if base.is_dir()), None)
        else:
            base = mounts if controllers == "" else None
        if base is not None:
            inner = Path(path.lstrip("/"))
            yield from (base / each for each in (inner, *inner.parents) if (base / each).is_dir())


def _quota(group: Path) -> float | None:
    """Return how many cores a control group may use; None where it says nothing."""
    granted, _, period = _text(group / "cpu.max").partition(" ")
    if not granted:
        granted, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    try:
        return int(granted) / int(period) if int(granted) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max"
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """Read lines of names and whole numbers, such as those of /proc/meminfo."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def visible_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that this process sees, without opening any: a context on each would take memory of it."""
    if "torch" not in sys.modules and not any(map(os.path.exists, GPU_DEVICES)):
        return ()  # seconds sooner
    import torch

    count = torch.cuda.device_count()
    if not count:
        return ()
    told = _told_by_driver()
    if len(told) == count:
        return told
    if torch.version.hip is None:  # pragma: no cover - needs a GPU whose driver has no tool
        return tuple(Gpu(torch.cuda.get_device_name(index)) for index in range(count))
    free = [torch.cuda.mem_get_info(index) for index in range(count)]
    return tuple(Gpu(torch.cuda.get_device_name(index), total, left) for index, (left, total) in enumerate(free))


def _told_by_driver() -> tuple[Gpu, ...]:
    """Ask NVIDIA's own tool, which knows every GPU of the machine, and keep those that this process may see."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    fields = "index,uuid,name,memory.total,memory.free,driver_version"
    try:
        text = subprocess.run(
            [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            encoding="utf-8",
            check=True,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return gpus_in(text, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpus_in(table: str, visible: str | None) -> tuple[Gpu, ...]:
    """Read what ``nvidia-smi`` says.

    Parameters
    ----------
    table : str
        A line each: number, id, name, mebibytes in all, mebibytes left, driver.
    visible : str, optional
        CUDA_VISIBLE_DEVICES: numbers or beginnings of ids, in the order wanted; all if None.
    """
    every = {}
    for line in table.splitlines():
        cells = [part.strip() for part in line.split(",")]
        if len(cells) == 6:
            index, uuid, name, memory, free, driver = cells
            total, left = (int(size) * 2**20 if size.isdecimal() else 0 for size in (memory, free))
            every[index, uuid] = Gpu(name, total, left, driver)
    if visible is None:
        return tuple(every.values())
    chosen = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        found = [gpu for (index, uuid), gpu in every.items() if index == name or uuid.startswith(name)]
        if not found:  # CUDA, too, stops at the first that is none
            break
        chosen.append(found[0])
    return tuple(chosen)


# --- what a process has taken --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """The most memory that a client's work has taken of a process.

    Parameters
    ----------
    own : int
        Bytes of memory that each process takes for itself.
    shared : int
        Bytes that all processes of a machine share, such as files mapped into memory.
    gpu : int
        Bytes of its GPU's memory.
    measured : bool
        False for an estimate.
    """

    own: int
    shared: int = 0
    gpu: int = 0
    measured: bool = True

    def __or__(self, other: Footprint) -> Footprint:
        """Return the larger of both, number by number."""
        return Footprint(
            max(self.own, other.own),
            max(self.shared, other.shared),
            max(self.gpu, other.gpu),
            self.measured and other.measured,
        )

    def to_dict(self) -> Mapping[str, int | bool]:
        """Return plain data."""
        return dict(vars(self))


class _Meter:
    """Measures this process, and looks closer only when its peak has grown: that takes a walk over all its pages."""

    def __init__(self) -> None:
        self._seen: tuple[int, Footprint] | None = None

    def read(self) -> Footprint:
        status = {name: count * 1024 for name, count in _numbers(PROCESS / "status").items()}
        peak = status.get("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._seen is not None and peak <= self._seen[0] * NEWS:
            return replace(self._seen[1], gpu=_reserved())
        pages = {name: count * 1024 for name, count in _numbers(PROCESS / "smaps_rollup").items()}
        # files, mapped by all processes alike, and what a fork has in common with whom it was forked from
        common = max(0, status.get("RssAnon", 0) - pages["Private_Dirty"]) if "Private_Dirty" in pages else 0
        shared = status.get("RssFile", 0) + status.get("RssShmem", 0) + common
        self._seen = peak, Footprint(max(0, peak - shared), shared, _reserved())
        return self._seen[1]


_meter = _Meter()


def footprint() -> Footprint:
    """Measure this process from its beginning to now.

    The peak counts all resident pages, shared ones included; what is shared now is taken as shared at the peak, since
    weights and libraries stay. On a GPU, what torch has reserved, and the context beside it.
    """
    return _meter.read()


def _reserved() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_reserved()) + CUDA_CONTEXT
