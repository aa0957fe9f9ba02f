"""How many workers a machine bears: what one of them needs, measured where it can be, against what there is.

Nothing here changes a result; it changes how soon there is one, and whether there is one at all. What takes seconds to
import is imported when it is needed: Ray is started before that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpeft.cache import cache_dir
from fedpeft.config import RunConfig, cohort_size
from fedpeft.errors import FedpeftError
from fedpeft.jsons import to_json
from fedpeft.runs.machine import Footprint
from fedpeft.simulations.grids.cluster import OWN, Fixed, Node, Sizer, Sizing, named_address, this_node
from fedpeft.simulations.predicted import predict

MARGIN = 1.2  # of what a worker needs, that must be free for it
SPARE = 0.1  # of the free memory, left to Ray's store and to whatever else runs
MOST_PER_GPU = 4  # more at a time than this only wait for one another; not measured, see docs/cluster.md
LIBRARIES = 450 * 2**20  # bytes that torch, transformers, peft and what they load take of a process, seen on Linux
UNKNOWN = Footprint(2**30, measured=False)
GROWTH = 1.1  # what a worker needs must have changed by more, for the number of workers to be thought over
KEPT = "footprints"
# of the section `train`, what takes no memory
NO_MATTER = frozenset({"local_steps", "local_epochs", "learning_rate", "lr_schedule", "max_grad_norm", "proximal_mu"})
VERSIONS = ("fedpeft", "torch", "transformers", "peft", "opacus")


def sizer_of(config: RunConfig) -> Sizer | None:
    """Return who decides about a run's workers; None where it is to be done in this process.

    Parameters
    ----------
    config : RunConfig
        Whose section ``[simulation]`` may leave the decision to the machine.
    """
    asked = config.simulation
    if asked.workers == 0:
        return None
    if asked.workers is not None and asked.gpus_per_worker is not None:
        return Fixed(asked.workers, asked.gpus_per_worker)
    return Automatic(config)


class Automatic:
    """A `Sizer` that goes by cores, memory and GPUs.

    Of private runs nothing is measured, since how much memory a client needs depends on its rows, and what is chosen
    stands on record.

    Parameters
    ----------
    config : RunConfig
        The run's; what it leaves open is chosen.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config, self._asked = config, config.simulation

    @cached_property
    def _file(self) -> Path | None:
        return None if self._config.privacy.is_private else _file_of(self._config)

    @cached_property
    def need(self) -> Footprint:
        """What a worker is taken to need."""
        return (_kept(self._file) if self._file is not None else None) or estimate(self._config)

    def fit(self, nodes: Sequence[Node], most: int | None = None) -> Sizing:
        """Choose for these nodes; see `Sizer`."""
        clients = _at_work(self._config, self._config.federation.clients)
        bound = min((count for count in (most, clients) if count is not None), default=None)
        asked = self._asked
        if asked.gpus_per_worker != 0 and any(node.gpus for node in nodes):
            return self._on_gpus(nodes, bound)
        cores = sum(node.cpus // asked.threads_per_worker for node in nodes)
        bears = [min(node.cpus // asked.threads_per_worker, self._by_memory(node)) for node in nodes]
        free = sum(node.machine.free for node in nodes)
        workers, reason = _smallest(
            (
                max(1, cores),
                f"one for {asked.threads_per_worker} cores" if asked.threads_per_worker > 1 else "one a core",
            ),
            (max(1, sum(bears)), "memory bears no more"),
            (bound, "as many as clients are at work"),
        )
        what = f"{sum(node.cpus for node in nodes)} cores, {free / 1e9:.3g} GB free, {self._needed(gpu=False)}"
        if asked.workers is not None:
            reason = (
                "as asked" if asked.workers <= max(1, sum(bears)) else f"as asked, and memory may bear {sum(bears)}"
            )
            workers = asked.workers
        elif sum(bears) == 0:
            reason = "one at least, though memory may not bear it"
        return Sizing(workers, 0.0, f"{reason} ({what}{_several(nodes)})", self.need)

    def learn(self, footprint: Footprint) -> None:
        """Take in what a worker has needed, and keep it for the next run."""
        before = self.need
        if self._file is None or (before.measured and not _grown(before, footprint)):
            return
        self.need = before | footprint if before.measured else footprint
        _keep(self._file, self.need)

    def _by_memory(self, node: Node) -> int:
        """Return how many workers a node's memory bears beside the driver, which holds a model as well."""
        room = node.machine.free * (1 - SPARE) - self.need.shared - (self.need.own if node.drives else 0)
        return max(0, int(room // (MARGIN * self.need.own)))

    def _on_gpus(self, nodes: Sequence[Node], bound: int | None) -> Sizing:
        """Choose how many clients share a GPU: as many as its memory bears and cores feed, spread over all GPUs."""
        asked, with_gpus = self._asked, [node for node in nodes if node.gpus]
        gpus, share, spread = sum(node.gpus for node in nodes), asked.gpus_per_worker, asked.workers or bound
        if share is None:
            each, reason = _smallest(
                (None if spread is None else max(1, -(-spread // gpus)), "spread over all GPUs"),
                (min(self._by_gpu_memory(node) for node in with_gpus), "GPU memory bears no more"),
                (min(max(1, node.cpus // node.gpus // asked.threads_per_worker) for node in with_gpus), "one a core"),
                (MOST_PER_GPU, "more would only wait for one another"),
            )
            share = int(10_000 / each) / 10_000  # Ray counts shares in ten-thousandths
            places = [node.gpus * each for node in with_gpus]
        else:
            each, reason = max(1, int(1 / share + 1e-6)), "as asked"
            places = [node.gpus * each if share <= 1 else int(node.gpus // share) for node in with_gpus]
        bears = [min(place, self._by_memory(node)) for place, node in zip(places, with_gpus, strict=True)]
        workers, _ = _smallest((max(1, sum(bears)), ""), (bound, ""))
        free = sum(gpu.free for node in with_gpus for gpu in node.machine.gpus)
        what = f"{gpus} GPUs, {free / 1e9:.3g} GB of them free, {self._needed(gpu=True)}{_several(nodes)}"
        return Sizing(asked.workers or workers, share, f"{each} on a GPU, {reason} ({what})", self.need)

    def _by_gpu_memory(self, node: Node) -> int:
        """Return how many clients the smallest of a node's GPUs bears, at least 1; 1 where nothing is known of it."""
        free = [gpu.free for gpu in node.machine.gpus]
        if not free or not self.need.gpu:
            return 1
        # the driver scores on the first of its node's
        left = [size - (self.need.gpu if node.drives and index == 0 else 0) for index, size in enumerate(free)]
        return max(1, int(min(left) // (MARGIN * self.need.gpu)))

    def _needed(self, *, gpu: bool) -> str:
        kind = "measured" if self.need.measured else "estimated"
        of_gpu = f" and {self.need.gpu / 1e9:.2g} GB of a GPU" if gpu and self.need.gpu else ""
        return f"a worker takes {self.need.own / 1e9:.2g} GB{of_gpu}, {kind}"


def _grown(before: Footprint, now: Footprint) -> bool:
    return now.own > GROWTH * before.own or now.gpu > GROWTH * before.gpu


def planned(config: RunConfig, clients: int) -> Sizing:
    """Return what workers a run of so many clients would have if it began now.

    A cluster is not asked: what it bears is known once it is connected to.
    """
    sizer = sizer_of(config)
    if sizer is None:
        return in_this_process()
    named, address = named_address(config.simulation.address)
    if address != OWN and config.simulation.workers is None:
        return Sizing(1, 0.0, f"or more: as many as the cluster at {named} = '{address}' bears")
    return sizer.fit([this_node()], _at_work(config, clients))


def in_this_process() -> Sizing:
    """Return the sizing of a run without workers."""
    return Sizing(0, 0.0, "clients train one after the other in this process")


def at_work(config: RunConfig, clients: int) -> int:
    """Return how many of so many clients may be at work at a time."""
    found = _at_work(config, clients)
    assert found is not None
    return found


def _at_work(config: RunConfig, clients: int | None) -> int | None:
    if clients is None:
        return None
    from fedpeft.privacy.levels import level_of

    if level_of(config.privacy).secret_cohort(config.privacy):
        return clients  # each is drawn by its own coin
    return cohort_size(clients, config.federation.fraction, config.federation.min_clients)


def _smallest(*bounds: tuple[int | None, str]) -> tuple[int, str]:
    """Return the smallest number that is one, and the reason for it; of equal ones the first."""
    return min(((number, reason) for number, reason in bounds if number is not None), key=lambda each: each[0])


def _several(nodes: Sequence[Node]) -> str:
    return f", on {len(nodes)} nodes" if len(nodes) > 1 else ""


# --- what a worker needs: kept from the last run ---------------------------------------------------------------------


def _file_of(config: RunConfig) -> Path | None:
    """Return where the footprint of such a run is kept; its name is the hash of all that it depends on."""
    from fedpeft.models import base_folder
    from fedpeft.resident import ResidentKey

    try:
        folder = base_folder(config.model)
        parts = {name: importlib.metadata.version(name) for name in VERSIONS}
        key: dict[str, Any] = {
            name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
            for name, value in vars(ResidentKey.of(config)).items()
            if name not in ("seed", "clients", "partition", "canaries")
        }
        key["train"] = {name: value for name, value in key["train"].items() if name not in NO_MATTER}
        weights = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
        described = (folder / "config.json").read_text(encoding="utf-8")
    except (FedpeftError, OSError, UnicodeDecodeError):
        return None  # the run itself will say what is wrong
    how = (config.simulation.threads_per_worker, config.simulation.batch_clients)
    text = to_json({"key": key, "versions": parts, "weights": weights, "base": described, "how": how})
    return cache_dir() / KEPT / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"


def _kept(file: Path) -> Footprint | None:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        own, shared, gpu = (int(held[name]) for name in ("own", "shared", "gpu"))
        return Footprint(own, shared, gpu) if own > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(file: Path, footprint: Footprint) -> None:
    """Write it whole or not at all; a run is not lost because its cache cannot be written."""
    draft = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(to_json(asdict(footprint)), encoding="utf-8")
        os.replace(draft, file)
    except OSError:
        draft.unlink(missing_ok=True)


# --- what a worker needs: estimated ----------------------------------------------------------------------------------


def estimate(config: RunConfig) -> Footprint:
    """Estimate what a worker needs, from the base's files alone; see `fedpeft.simulations.predicted`.

    Parameters
    ----------
    config : RunConfig
        Names base, precision and batch.
    """
    found = predict(config)
    if found is None:
        return UNKNOWN
    return Footprint(LIBRARIES + found.working, 0, found.working + 600 * 2**20, measured=False)


def measured(config: RunConfig) -> Footprint | None:
    """Return what a worker of such a run has taken before on this machine; None where that is not known, or private."""
    file = Automatic(config)._file
    return None if file is None else _kept(file)
