"""What is slow, short or broken on this machine: a function each, a row each in `CHECKS`.

A check looks at one thing and takes less than a second; it returns what it has seen, and the setting to change.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from fedpeft.cache import CACHE_VARIABLE, cache_dir
from fedpeft.runs.machine import ROOT, Machine, here

SHARED_MEMORY = Path("dev/shm")
STORE = 2 * 2**30  # bytes of Ray's store that a run would like to have in shared memory
SMALLEST_STORE = 512 * 2**20
FILES = 4096  # open files: Ray has some for each worker, and a driver some for each client's answer
FEWEST_FILES = 512
DISK, LEAST_DISK = 5 * 10**9, 500 * 10**6  # bytes
MEMORY, LEAST_MEMORY = 4 * 10**9, 10**9
WATCHED = ("torch", "flwr", "ray", "transformers", "peft", "opacus")
SECONDS = 0.4  # that one product is repeated for
ROWS, INNER, OUTER = 2048, 384, 1536  # the shape of MiniLM's feed-forward layer over 16 texts of 128 tokens


class State(StrEnum):
    """How a thing is: `BROKEN` such that a run will fail."""

    OK = "ok"
    SLOW = "slow"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Parameters
    ----------
    name : str
        Of what was looked at.
    state : State
        How it is.
    seen : str
        What was seen.
    advice : str
        What to do, empty where there is nothing.
    """

    name: str
    state: State
    seen: str
    advice: str = ""

    def to_dict(self) -> Mapping[str, Any]:
        """Return plain data."""
        return asdict(self)


Check = Callable[[Machine], Finding]


def examine() -> list[Finding]:
    """Make all checks, in order."""
    machine = here()
    return [check(machine) for check in CHECKS]


def processor(machine: Machine, root: Path = ROOT) -> Finding:
    """Tell whether the processor multiplies bf16 in hardware."""
    flags: set[str] = set()
    model = "unknown processor"
    for line in _lines(root / "proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features") and not flags:
            flags = set(value.split())
        if name.strip() == "model name":
            model = value.strip()
    for needed, called in (({"amx_bf16", "amx_tile"}, "AMX"), ({"avx512_bf16"}, "AVX512-BF16"), ({"bf16"}, "bf16")):
        if needed <= flags:
            return Finding("processor", State.OK, f"{model}, with {called}", f"try {BF16}, see below what it gains")
    return Finding(
        "processor", State.OK, f"{model}, without AMX or AVX512-BF16", "leave train.precision=fp32: bf16 loses here"
    )


BF16 = "train.precision=bf16"


def products(machine: Machine) -> Finding:
    """Time one thread's matrix products: fp32 by MKL and by oneDNN, and bf16."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs, weight = torch.randn(ROWS, INNER), torch.randn(OUTER, INNER)
        rates = {"fp32": _rate(inputs, weight)}
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            rates["fp32 by oneDNN"] = _rate(inputs.to_mkldnn(), weight.to_mkldnn())
        rates["bf16"] = _rate(inputs.bfloat16(), weight.bfloat16())
    finally:
        torch.set_num_threads(threads)
    seen = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    gain = rates["bf16"] / rates["fp32"]
    advice = f"{BF16}: its products run {gain:.1f} times as fast" if gain > 1.5 else "leave train.precision=fp32"
    return Finding("matrix products", State.OK, f"GFLOP/s of one thread: {seen}", advice)


def _rate(inputs: Any, weight: Any) -> float:
    """Return the billions of operations a second of this thread, by its own time: others may be busy beside it."""
    from torch.nn.functional import linear

    linear(inputs, weight)  # whoever is first prepares
    begun, latest, count = time.thread_time(), time.perf_counter() + 3 * SECONDS, 0
    while (taken := time.thread_time() - begun) < SECONDS and time.perf_counter() < latest:
        linear(inputs, weight)
        count += 1
    return 2e-9 * ROWS * INNER * OUTER * count / taken


def gpus(machine: Machine) -> Finding:
    """Tell which GPUs there are, and whether this torch can use them."""
    import torch

    if machine.gpus:
        seen = "; ".join(
            f"{gpu.name}, {gpu.free / 1e9:.3g} of {gpu.memory / 1e9:.3g} GB free, driver {gpu.driver or 'unknown'}"
            for gpu in machine.gpus
        )
        return Finding("GPU", State.OK, seen, "used unless simulation.gpus_per_worker=0")
    if Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        built = torch.version.cuda or "no CUDA"
        advice = "install a torch that is built for this driver, or a driver for this torch"
        return Finding("GPU", State.SLOW, f"a GPU that torch cannot use; it is built for {built}", advice)
    return Finding("GPU", State.OK, "none, or none that is visible")


def cores(machine: Machine) -> Finding:
    """Tell how many cores there are, and what of them is left to this process."""
    held = [limit for limit in machine.limits if "core" in limit]
    seen = f"{machine.cores} usable of {os.cpu_count()}"
    if held:
        seen += f": {'; '.join(held)}"
    if machine.cores == 1:
        return Finding("cores", State.SLOW, seen, "simulation.workers=0 saves Ray's processes; or give it more cores")
    return Finding(
        "cores", State.OK, seen, f"one worker a core unless simulation.workers says more than {machine.cores}"
    )


def threads(machine: Machine) -> Finding:
    """Tell whether the environment decides about threads."""
    set_here = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    if not set_here:
        return Finding("threads", State.OK, "OMP_NUM_THREADS is unset; a worker has one thread")
    seen = ", ".join(f"{name}={value}" for name, value in set_here.items())
    counts = [int(value) for value in set_here.values() if value.isdecimal()]
    if any(count > machine.cores for count in counts):
        return Finding("threads", State.SLOW, f"{seen}, and {machine.cores} cores", "unset them")
    return Finding("threads", State.OK, seen, "of this process; workers have simulation.threads_per_worker")


def memory(machine: Machine) -> Finding:
    """Tell how much memory is left."""
    seen = f"{machine.free / 1e9:.3g} of {machine.memory / 1e9:.3g} GB free"
    held = [limit for limit in machine.limits if "memory" in limit]
    seen += f": {'; '.join(held)}" if held else ""
    if machine.free < LEAST_MEMORY:
        return Finding("memory", State.BROKEN, seen, "free some: the libraries of a run alone take half a gigabyte")
    if machine.free < MEMORY:
        return Finding("memory", State.SLOW, seen, "simulation.workers=0, or fewer rows a step: train.batch_size")
    return Finding("memory", State.OK, seen)


def swap(machine: Machine, root: Path = ROOT) -> Finding:
    """Tell what happens when memory runs out."""
    known = {line.split(":")[0]: line.split()[1] for line in _lines(root / "proc/meminfo") if len(line.split()) > 1}
    total, left = (int(known.get(name, "0")) * 1024 for name in ("SwapTotal", "SwapFree"))
    mode = "".join(_lines(root / "proc/sys/vm/overcommit_memory"))
    seen = f"{(total - left) / 1e9:.3g} of {total / 1e9:.3g} GB of swap in use, overcommit {mode or 'unknown'}"
    if mode == "2":
        advice = "sysctl vm.overcommit_memory=0: forks and mapped files may be refused though memory is free"
        return Finding("swap", State.SLOW, seen, advice)
    if total and total - left > total / 2:
        return Finding("swap", State.SLOW, seen, "free memory: what is swapped out runs a thousand times slower")
    return Finding("swap", State.OK, seen)


def shared_memory(machine: Machine, root: Path = ROOT) -> Finding:
    """Tell whether Ray's store finds room in shared memory."""
    folder = root / SHARED_MEMORY
    if not folder.is_dir():
        return Finding("/dev/shm", State.SLOW, "not there", "mount it: Ray's store goes through files without it")
    free = shutil.disk_usage(folder).free
    seen = f"{free / 1e9:.3g} GB free"
    if free < SMALLEST_STORE:
        return Finding("/dev/shm", State.SLOW, seen, "docker run --shm-size=2g: Ray's store goes through files now")
    if free < STORE:
        return Finding("/dev/shm", State.OK, seen, "docker run --shm-size=2g, where adapters are large")
    return Finding("/dev/shm", State.OK, seen)


def open_files(machine: Machine) -> Finding:
    """Tell how many files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    seen = f"{shown[0]} at most, {shown[1]} if asked for"
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return Finding("open files", State.OK, seen)
    advice = f"ulimit -n {FILES}" if hard == resource.RLIM_INFINITY or hard >= FILES else f"ulimit -n {hard}"
    return Finding("open files", State.BROKEN if soft < FEWEST_FILES else State.SLOW, seen, advice)


def cache_disk(machine: Machine) -> Finding:
    """Tell whether the cache can be written, and what it has room for."""
    return _disk("cache", cache_dir(), f"set {CACHE_VARIABLE} to a folder on another disk")


def runs_disk(machine: Machine) -> Finding:
    """Tell whether run directories can be written, and what there is room for."""
    return _disk("runs folder", Path("runs").absolute(), "give another --out")


def _disk(name: str, folder: Path, elsewhere: str) -> Finding:
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    seen = f"{free / 1e9:.3g} GB free for '{folder}'"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, State.BROKEN, f"'{there}' cannot be written", elsewhere)
    if free < LEAST_DISK:
        return Finding(name, State.BROKEN, seen, f"make room, or {elsewhere}")
    if free < DISK:
        return Finding(name, State.SLOW, seen, f"make room, or {elsewhere}")
    return Finding(name, State.OK, seen)


def packages(machine: Machine) -> Finding:
    """Tell whether the libraries are of the versions that this package asks for."""
    wrong, seen = [], []
    for requirement in _requirements():
        if requirement.name not in WATCHED or (requirement.marker and not requirement.marker.evaluate()):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        seen.append(f"{requirement.name} {version}")
        # a build's own suffix, such as +cpu, says nothing about the release
        if not requirement.specifier.contains(Version(version).public, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Finding("packages", State.BROKEN, "; ".join(wrong), "pip install --upgrade fedpeft")
    return Finding("packages", State.OK, ", ".join(seen))


def _requirements() -> list[Requirement]:
    """Return what fedpeft asks for, and the ray that flwr pins."""
    own = [Requirement(line) for line in importlib.metadata.requires("fedpeft") or ()]
    try:
        flwr = [Requirement(line) for line in importlib.metadata.requires("flwr") or ()]
    except importlib.metadata.PackageNotFoundError:
        return own
    pinned = [each for each in flwr if each.name == "ray" and re.search("simulation", str(each.marker))]
    for each in pinned:
        each.marker = None
    return [each for each in own if each.name != "ray" or not pinned] + pinned[:1]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


CHECKS: tuple[Check, ...] = (
    *(packages, processor, products, gpus, cores, threads, memory, swap),
    *(shared_memory, open_files, cache_disk, runs_disk),
)
