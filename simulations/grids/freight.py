"""Base and rows on their way to nodes that lack them: through Ray's object store, once a node.

A cluster whose nodes share a file system needs nothing of this: a path that leads to the same content there is used as
it is. Else the driver puts the files into the store, and the first worker of a node that needs them writes them into
the node's cache, under a lock, and checks what came by its hash.

Ray has a way of its own, a ``working_dir`` in `runtime_env`; it goes through the cluster's head in one archive of half
a gigabyte at most, and is unpacked anew for every job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.cache import cache_dir, locked, publishing
from fedpeft.config import Scalar
from fedpeft.deployment import run_config
from fedpeft.errors import DataError
from fedpeft.models import HUB_PATTERNS
from fedpeft.resident import Resident, ResidentKey, Supplies, suppliers
from fedpeft.tasks.encoding import MODEL_FILES, entries

if TYPE_CHECKING:
    from ray import ObjectRef

ANSWER_SECONDS = 600.0  # that a node may take to look at its files, which it may have to read whole
CHUNK = 64 * 2**20  # bytes of a file that are one object in the store
RECEIVED, HASHES = "received", "hashes"


@dataclass(frozen=True)
class Item:
    """One file of a bundle: its path within it, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """The files of one folder, by content.

    Parameters
    ----------
    where : str
        Where the folder may be on any machine: a path, or one below the cache if `cached`.
    cached : bool
        Whether it belongs to the cache, wherever that is.
    items : tuple of Item
        Its files, sorted by name.
    """

    where: str
    cached: bool
    items: tuple[Item, ...]

    @classmethod
    def of(cls, folder: Path, where: str, patterns: Iterable[str]) -> Bundle:
        """Describe the files of a folder that fit one of the patterns."""
        inside = cache_dir().resolve()
        cached = folder.resolve().is_relative_to(inside)
        files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        items = [Item(path.relative_to(folder).as_posix(), path.stat().st_size, _hash(path)) for path in files]
        if cached:
            where = folder.resolve().relative_to(inside).as_posix()
        return cls(where, cached, tuple(sorted(items, key=lambda item: item.name)))

    @property
    def digest(self) -> str:
        """SHA-256 of all that it holds."""
        lines = [f"{item.name}\x1f{item.size}\x1f{item.sha256}\n" for item in self.items]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def landing(self) -> Path:
        """Where it is put on a machine that lacks it."""
        return cache_dir() / self.where if self.cached else cache_dir() / RECEIVED / self.digest[:40]

    def found(self) -> Path | None:
        """Return where this machine has it already; None where it has not."""
        places = [self.landing] if self.cached else [Path(self.where).expanduser(), self.landing]
        return next((place for place in places if self._is(place)), None)

    def _is(self, folder: Path) -> bool:
        try:
            files = [(folder / item.name, item) for item in self.items]
            if any(path.stat().st_size != item.size for path, item in files):
                return False
            return all(_hash(path) == item.sha256 for path, item in files)
        except OSError:
            return False


# --- at the driver ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Freight:
    """What a worker needs to hold model and rows of a run, wherever it is.

    Parameters
    ----------
    config : mapping of str to scalar
        The run's, flat.
    model : Bundle
        Folder of the base.
    train, test : Bundle
        Entries of the cache with encoded rows; no `test` where test rows are some of `train`.
    stored : mapping of str to list of list of ObjectRef
        The parts of each file of each bundle, by the bundle's digest; of those alone that some node has lacked.
    """

    config: Mapping[str, Scalar]
    model: Bundle
    train: Bundle
    test: Bundle | None
    stored: Mapping[str, Sequence[Sequence[ObjectRef]]]

    @classmethod
    def of(cls, config: Mapping[str, Scalar], home: Resident) -> Freight:
        """Describe what a run needs; nothing is stored yet."""
        name = home.config.model.name or ""
        where = name if Path(name).expanduser().is_dir() else str(home.folder)
        _ = home.data  # which makes what `entries` names
        train, test = entries(home.config, home.folder)
        return cls(
            config,
            Bundle.of(home.folder, where, (*HUB_PATTERNS, *MODEL_FILES)),
            Bundle.of(train, str(train), ("*",)),
            None if test is None else Bundle.of(test, str(test), ("*",)),
            {},
        )

    @property
    def bundles(self) -> list[Bundle]:
        """All of them."""
        return [self.model, self.train] + ([] if self.test is None else [self.test])

    def with_stored(self, nodes: Iterable[str]) -> Freight:
        """Put into Ray's store what one of these nodes lacks, unless it is there.

        Parameters
        ----------
        nodes : iterable of str
            Ray's ids of nodes.
        """
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = [
            ray.remote(lacking)
            .options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
            )
            .remote(self.bundles)
            for node in nodes
        ]
        missing: set[str] = set()
        for answer in asked:
            try:
                missing |= set(ray.get(answer, timeout=ANSWER_SECONDS))
            except RayError:  # a node that has left lacks nothing; one that cannot answer may lack all
                missing |= {bundle.digest for bundle in self.bundles}
        missing -= self.stored.keys()
        stored = {bundle.digest: _put(bundle, ray.put) for bundle in self.bundles if bundle.digest in missing}
        return replace(self, stored={**self.stored, **stored})

    # --- at a worker -------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Have this process take model and rows from here when it is to hold them."""
        suppliers.clear()
        suppliers[ResidentKey.of(run_config(dict(self.config)))] = self.land

    def land(self) -> Supplies:
        """Return where this machine has the files, once they are there.

        Raises
        ------
        DataError
            The cache cannot be written, or what came is not what was sent.
        """
        import ray

        def at(bundle: Bundle) -> Path:
            return land(bundle, self.stored.get(bundle.digest, ()), ray.get)

        return Supplies(at(self.model), at(self.train), None if self.test is None else at(self.test))


def lacking(bundles: Sequence[Bundle]) -> list[str]:
    """Return the digests of the bundles that this machine has not."""
    return [bundle.digest for bundle in bundles if bundle.found() is None]


def _put(bundle: Bundle, put: Callable[[bytes], ObjectRef]) -> list[list[ObjectRef]]:
    folder = bundle.found()
    if folder is None:
        raise DataError(f"the files of '{bundle.where}' changed while the run began; run again.")
    stored = []
    for item in bundle.items:
        with (folder / item.name).open("rb") as file:
            stored.append([put(part) for part in iter(lambda file=file: file.read(CHUNK), b"")])  # type: ignore[misc]
    return stored


def land(bundle: Bundle, stored: Sequence[Sequence[Any]], get: Callable[[Any], bytes]) -> Path:
    """Return where this machine has a bundle, after writing it there if it has not.

    Parameters
    ----------
    bundle : Bundle
        What is wanted.
    stored : sequence of sequence
        What stands for the parts of each file.
    get : callable
        Returns the bytes of a part.

    Raises
    ------
    DataError
        See `Freight.land`.
    """
    if (found := bundle.found()) is not None:
        return found
    folder = bundle.landing
    with locked(folder):
        if (found := bundle.found()) is not None:  # another process was first
            return found
        if len(stored) != len(bundle.items):
            raise DataError(f"'{bundle.where}' is not on this node, and nothing was sent in its place; run again.")
        with publishing(folder) as draft:
            for item, parts in zip(bundle.items, stored, strict=True):
                _write(draft / item.name, (get(part) for part in parts), item)
    return folder


def _write(path: Path, parts: Iterable[bytes], item: Item) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            contents.update(part)
            file.write(part)
    if contents.hexdigest() != item.sha256:
        raise DataError(f"'{item.name}' arrived damaged on this node; run again.")


def _hash(path: Path) -> str:
    """Return a file's SHA-256, read once as long as neither its size nor its time changes."""
    state = path.stat()
    known = json.dumps([str(path.resolve()), state.st_size, state.st_mtime_ns])
    note = cache_dir() / HASHES / hashlib.sha256(known.encode()).hexdigest()[:40]
    try:
        if len(noted := note.read_text(encoding="ascii")) == 64:
            return noted
    except (OSError, UnicodeDecodeError):
        pass
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(found, encoding="ascii")
    except OSError:
        pass  # it is read again, then
    return found
