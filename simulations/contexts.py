"""Flower's contexts of a simulation's clients: made when they are asked for, with states that lie on disk.

A hundred thousand clients cost the driver nothing but their names, and what a client keeps from round to round is read
when the client is sent a message. Each version of a client's state is a file of its own, named by the hash of its
contents: a checkpoint need only name versions, and a file that is damaged is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from fedpeft.cache import sync
from fedpeft.config import Scalar
from fedpeft.errors import RunDirectoryError
from fedpeft.runs import folder_name
from fedpeft.runs.files import write_whole
from fedpeft.wire import to_tensors

RUN_ID = 1
_VERSION = re.compile("[0-9a-f]{64}")  # files under no other name are ever removed
STATE, SUFFIX = "state", ".safetensors"
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # kinds of records, in a file's header
Snapshot = Mapping[str, str]  # the SHA-256 of each client's state, by client id, of those that keep anything


@dataclass(frozen=True)
class _Version:
    """A state as it is on disk: the hash of its file, and the names of its records."""

    sha256: str
    records: tuple[str, ...]


class Contexts(Mapping[int, Context]):
    """The context of each client by node id, which is the client's place plus one.

    Parameters
    ----------
    client_ids : sequence of str
        The clients in order.
    run_config : mapping
        The run's flat configuration, which all contexts hold.
    node_config : mapping
        What all nodes are started with, besides which partition is theirs.
    folder : Path
        Where each client has a folder, made when it first keeps something.

    Notes
    -----
    Every look makes another context: what is changed in one is kept by `keep`.
    """

    def __init__(
        self,
        client_ids: Sequence[str],
        run_config: Mapping[str, Scalar],
        node_config: Mapping[str, Scalar],
        folder: Path,
    ) -> None:
        self._clients, self._run_config, self._node_config = client_ids, dict(run_config), dict(node_config)
        self._folder = folder
        self._versions: dict[int, _Version] = {}
        self._left: set[tuple[int, str]] = set()  # versions on disk that are nobody's any more
        self._snapshots: list[Snapshot] = []
        self._unsynced: set[Path] = set()  # folders with names that may not be on the disk
        self._read: tuple[str, RecordDict] | None = None  # charging and sending look at the same state

    def __getitem__(self, node: int) -> Context:
        if node not in self:
            raise KeyError(node)
        return Context(RUN_ID, node, self.node_config(node), self._state(node), dict(self._run_config))

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self._clients) + 1))

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, int) and 1 <= node <= len(self._clients)

    def node_config(self, node: int) -> dict[str, Scalar]:
        """Return what a node is started with."""
        return {"partition-id": node - 1, "num-partitions": len(self._clients), **self._node_config}

    def keep(self, node: int, state: RecordDict) -> None:
        """Write a client's new state, unless it is the old one; all of it is there afterwards, or nothing.

        Parameters
        ----------
        node : int
            The client's.
        state : flwr.app.RecordDict
            What its next context holds.

        Raises
        ------
        RunDirectoryError
            It cannot be written. The client would go on with what it kept before, and the run be another one.
        """
        before = self._versions.get(node)
        if not state:
            self._versions.pop(node, None)
        else:
            data = to_bytes(state)
            sha256 = hashlib.sha256(data).hexdigest()
            if before is not None and before.sha256 == sha256:
                return
            self._write(node, sha256, data)
            self._versions[node] = _Version(sha256, tuple(state))
        if before is not None:
            self._leave(node, before.sha256)

    def snapshot(self) -> Snapshot:
        """Return which version each client keeps now, as a value for JSON; these files stay until `forget`.

        They are on the disk then.

        Raises
        ------
        RunDirectoryError
            They cannot be brought there.
        """
        kept = {self._clients[node - 1]: self._versions[node].sha256 for node in sorted(self._versions)}
        for folder in self._unsynced:  # a checkpoint that is on the disk must not name what is not
            try:
                sync(folder)
            except OSError as error:
                raise RunDirectoryError(f"cannot write '{folder}': {error.strerror or error}") from None
        self._unsynced.clear()
        self._snapshots.append(kept)
        return dict(kept)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to the versions of a snapshot, empty for none; other files stay until `forget`.

        Raises
        ------
        RunDirectoryError
            A version that is missing, damaged, or of a client that is not here; nothing has changed then.
        """
        nodes = {client: index + 1 for index, client in enumerate(self._clients)}
        versions = {}
        for client, sha256 in snapshot.items():
            if client not in nodes:
                raise RunDirectoryError(
                    f"a checkpoint holds the state of client {client}, which this run does not have."
                )
            versions[nodes[client]] = _Version(sha256, tuple(self._read_state(nodes[client], sha256)))
        self._versions, self._snapshots = versions, [dict(snapshot)]
        self._left = {
            (node, path.stem)
            for client, node in nodes.items()
            for path in (self._folder / folder_name(client) / STATE).glob(f"*{SUFFIX}")
            if _VERSION.fullmatch(path.stem) and (node not in versions or versions[node].sha256 != path.stem)
        }

    def forget(self, kept: Iterable[Snapshot]) -> None:
        """Remove all files that no client needs now and none of these snapshots names."""
        self._snapshots = [dict(snapshot) for snapshot in kept]
        left, self._left = self._left, set()
        for node, sha256 in left:
            self._leave(node, sha256)

    def records(self, name: str) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the tensors of a record that clients keep, by client id, each read when it is looked at."""
        return _Records(self, name)

    def holders(self, name: str) -> dict[str, int]:
        """Return the node of each client that keeps a record of this name, in the order of nodes."""
        return {
            self._clients[node - 1]: node for node in sorted(self._versions) if name in self._versions[node].records
        }

    def _state(self, node: int) -> RecordDict:
        version = self._versions.get(node)
        if version is None:
            return RecordDict()
        if self._read is None or self._read[0] != version.sha256:
            self._read = version.sha256, self._read_state(node, version.sha256)
        return RecordDict(dict(self._read[1]))

    def _path(self, node: int, sha256: str) -> Path:
        return self._folder / folder_name(self._clients[node - 1]) / STATE / f"{sha256}{SUFFIX}"

    def _write(self, node: int, sha256: str, data: bytes) -> None:
        path = self._path(node, sha256)
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._unsynced |= {path.parent.parent, self._folder, self._folder.parent}
            write_whole(path, data, path.with_suffix(".partial"))
            self._unsynced.add(path.parent)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write what client {self._clients[node - 1]} keeps into '{path.parent}': "
                f"{error.strerror or error}; make room there, and run again."
            ) from None

    def _read_state(self, node: int, sha256: str) -> RecordDict:
        if not (isinstance(sha256, str) and _VERSION.fullmatch(sha256)):
            raise RunDirectoryError(f"what client {self._clients[node - 1]} keeps has no name of ours: {sha256!r:.80}")
        data = self._bytes(node, sha256)
        try:
            return from_bytes(data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise RunDirectoryError(
                f"what client {self._clients[node - 1]} keeps is no state of a client: "
                f"'{self._path(node, sha256)}' ({type(error).__name__})"
            ) from None

    def _bytes(self, node: int, sha256: str) -> bytes:
        path = self._path(node, sha256)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunDirectoryError(
                f"cannot read what client {self._clients[node - 1]} keeps, '{path}': {error.strerror or error}"
            ) from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RunDirectoryError(f"what client {self._clients[node - 1]} keeps is damaged: '{path}'")
        return data

    def _leave(self, node: int, sha256: str) -> None:
        """Remove a version's file, unless somebody needs it or may come back to it."""
        client, current = self._clients[node - 1], self._versions.get(node)
        if current is not None and current.sha256 == sha256:
            return
        if any(snapshot.get(client) == sha256 for snapshot in self._snapshots):
            self._left.add((node, sha256))
            return
        with contextlib.suppress(OSError):  # a file too many does no harm
            os.unlink(self._path(node, sha256))


class _Records(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of one record of clients' states, read client by client; the clients are those of its making."""

    def __init__(self, contexts: Contexts, name: str) -> None:
        self._contexts, self._name, self._nodes = contexts, name, contexts.holders(name)

    def __getitem__(self, client: str) -> Mapping[str, Tensor]:
        return to_tensors(self._contexts[self._nodes[client]].state.array_records[self._name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


def to_bytes(state: RecordDict) -> bytes:
    """Write a client's state: arrays as safetensors, everything else as JSON in their header."""
    header: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            header[name] = {ARRAYS: list(record)}
            # in C order: safetensors writes other strides as they lie
            arrays |= {_tensor_name(name, key): np.asarray(array.numpy(), order="C") for key, array in record.items()}
        else:
            header[name] = {CONFIG if isinstance(record, ConfigRecord) else METRICS: dict(record)}
    return save(arrays, {STATE: json.dumps(header)})


def from_bytes(data: bytes) -> RecordDict:
    """Undo `to_bytes`."""
    arrays = load(data)
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][STATE])
    state = RecordDict()
    for name, record in header.items():
        if ARRAYS in record:
            keys = record[ARRAYS]
            state[name] = ArrayRecord({key: Array(arrays[_tensor_name(name, key)]) for key in keys})
        elif CONFIG in record:
            state[name] = ConfigRecord(record[CONFIG])
        else:
            state[name] = MetricRecord(record[METRICS])
    return state


def _tensor_name(record: str, key: str) -> str:
    return json.dumps([record, key])
