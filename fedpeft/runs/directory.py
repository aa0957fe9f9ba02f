"""The run directory: made at once, appended to as things happen, readable while the run goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from fedpeft.config import RunConfig, read_toml, resolve
from fedpeft.errors import RunDirectoryError
from fedpeft.jsons import to_json
from fedpeft.runs.machine import environment

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, ENVIRONMENT_FILE, EVENTS_FILE = "config.toml", "environment.json", "metrics.jsonl"
ADAPTER, CHECKPOINTS, CLIENTS = "adapter", "checkpoints", "clients"  # folders
CANARIES = "canaries.json"  # planted rows, their coins and their scores
KEPT_CHECKPOINTS = 2

Event = dict[str, Any]
Listener = Callable[[Event], None]


class Saveable(Protocol):
    """What can be written as an adapter folder."""

    def __call__(self, directory: Path) -> None:
        """Write into this folder."""


def default_directory(config: RunConfig) -> Path:
    """Return ``runs/<name>``; without run.name, strategy and time name the run."""
    if config.run.name is not None:
        return Path("runs") / config.run.name
    stem = f"{config.strategy.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, again = Path("runs") / stem, 1
    while path.exists():
        again += 1
        path = Path("runs") / f"{stem}-{again}"
    return path


def folder_name(client_id: str) -> str:
    """Return a client's id as the name of a file: what comes from a column of rows must not be a path."""
    name = re.sub(r"[^\w.\- ]", lambda letter: quote(letter[0], safe=""), client_id)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # a locale that lacks its letters
        name = quote(client_id, safe="")
    return quote(name, safe="").replace(".", "%2E") if name.strip(".") == "" else name


def check_vacant(path: Path) -> None:
    """Refuse a folder that holds something already."""
    if (path / CONFIG_FILE).exists():
        raise RunDirectoryError(
            f"'{path}' already holds a run, which is not overwritten; give another --out, or remove it."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunDirectoryError(f"'{path}' exists and is not an empty folder; give another --out.")


class RunDirectory:
    """One run's folder.

    A disk that fills up while the run goes on loses no result: events that cannot be written are kept and written
    later, a checkpoint that does not fit is skipped, and the space of the final adapter is reserved from the start.

    Parameters
    ----------
    path : Path
        The folder; must hold nothing.
    config : RunConfig
        The resolved configuration, written as config.toml.
    adapter_bytes : int
        Size of the adapter.
    details : mapping, optional
        Further facts for environment.json, such as a preset's provenance.
    """

    def __init__(
        self, path: Path, config: RunConfig, adapter_bytes: int, details: Mapping[str, Any] | None = None
    ) -> None:
        check_vacant(path)
        self.path = path
        self._pending: list[str] = []
        self._problems: list[str] = []
        needed = adapter_bytes * (KEPT_CHECKPOINTS + 3) + (16 << 20)
        try:
            path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path).free
            if free < needed:
                raise RunDirectoryError(
                    f"'{path}' has {free / 1e6:.0f} MB free, and the run may write {needed / 1e6:.0f} MB; "
                    "make room, or give another --out."
                )
            (path / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
            facts = environment() | {"seed": config.run.seed} | dict(details or {})
            (path / ENVIRONMENT_FILE).write_text(to_json(facts, indent=2) + "\n", encoding="utf-8")
            (path / EVENTS_FILE).touch()
            self._reserve(adapter_bytes * 2 + (1 << 20))
        except OSError as error:
            raise RunDirectoryError(f"cannot write the run directory '{path}': {error.strerror or error}") from None

    @property
    def _reserved(self) -> Path:
        return self.path / ".reserved"

    def _reserve(self, size: int) -> None:
        with self._reserved.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)

    def take_problems(self) -> list[str]:
        """Return what could not be written since the last call, in words."""
        problems, self._problems = self._problems, []
        return problems

    def append(self, event: Event) -> None:
        """Add one line to metrics.jsonl and flush it."""
        self._pending.append(to_json(event) + "\n")
        try:
            with (self.path / EVENTS_FILE).open("a", encoding="utf-8") as file:
                size = file.tell()
                try:
                    file.write("".join(self._pending))
                    file.flush()
                except OSError:
                    os.truncate(self.path / EVENTS_FILE, size)  # half a line would spoil the file
                    raise
            self._pending.clear()
        except OSError as error:
            if len(self._pending) == 1:
                self._problems.append(
                    f"cannot write {EVENTS_FILE} ({error.strerror}); the events are kept and written later"
                )

    def checkpoint(self, server_round: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save the server's state after a round, atomically; the newest few are kept."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = self.path / CHECKPOINTS
        final, partial = folder / f"round-{server_round:04d}", folder / f".round-{server_round:04d}"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors")
            (partial / "state.json").write_text(
                to_json({"round": server_round, **facts}, indent=2) + "\n", encoding="utf-8"
            )
            partial.replace(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._problems.append(f"no checkpoint of round {server_round}: {getattr(error, 'strerror', None) or error}")
            return
        for old in sorted(folder.glob("round-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def write_traceback(self, name: str, text: str) -> Path | None:
        """Keep the traceback of a client that raised; return its path."""
        path = self.path / "faults" / f"{name}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            self._problems.append(f"cannot write {path.name}: {error.strerror}")
            return None
        return path

    def write_adapter(self, save: Saveable, name: str = ADAPTER) -> Path:
        """Write the final adapter into the space reserved for it."""
        self._reserved.unlink(missing_ok=True)
        path = self.path / name
        try:
            save(path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)  # the adapter is worth more
            save(path)
        return path


def read_config(path: Path) -> RunConfig:
    """Read the configuration of a finished or running run."""
    if not (path / CONFIG_FILE).is_file():
        raise RunDirectoryError(f"'{path}' is no run directory: it holds no {CONFIG_FILE}. `fedpeft runs` lists runs.")
    return resolve([read_toml(path / CONFIG_FILE)])


def read_events(path: Path) -> list[Event]:
    """Read metrics.jsonl; a last line still being written is left out."""
    file = path / EVENTS_FILE
    if not file.is_file():
        return []
    events = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run directory; empty where there is none to be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
