"""The run directory: made at once, appended to as things happen, readable while the run goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import quote

from fedpeft.cache import sync
from fedpeft.config import RunConfig, read_toml, resolve
from fedpeft.errors import RunDirectoryError
from fedpeft.jsons import to_json
from fedpeft.runs.checkpoints import (
    Checkpoint,
    checkpoint_rounds,
    remove_checkpoint,
    write_checkpoint,
)
from fedpeft.runs.files import open_own, write_whole
from fedpeft.runs.lock import LOCK_FILE, RunLock
from fedpeft.runs.machine import environment

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, ENVIRONMENT_FILE, EVENTS_FILE = "config.toml", "environment.json", "metrics.jsonl"
ADAPTER, ADAPTER_BEST, CLIENTS = "adapter", "adapter-best", "clients"  # folders
PAGE = "report.html"  # see `fedpeft.report.page`
CANARIES = "canaries.json"  # planted rows, their coins and their scores
RESERVED = ".reserved"  # space for the final adapter
# all that may be left of a run that was killed before it was one; the first is there in any case
UNBORN = (LOCK_FILE, ENVIRONMENT_FILE, f".{ENVIRONMENT_FILE}", f".{CONFIG_FILE}")
SIMULATED = "simulated"  # key of environment.json: whether the clients' states are in this folder
RESUMES = "resumes"  # key of environment.json: when and where the run went on

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
    inner = {each.name for each in path.iterdir()} if path.is_dir() else set()
    if (path.exists() and not path.is_dir()) or not (inner <= set(UNBORN) and (not inner or LOCK_FILE in inner)):
        raise RunDirectoryError(f"'{path}' exists and is not an empty folder; give another --out.")


class RunDirectory:
    """One run's folder, which nobody else writes into until it is closed.

    A disk that fills up while the run goes on loses no result: events that cannot be written are kept and written
    later, a checkpoint that does not fit is skipped, and the space of the final adapter is reserved from the start.

    Parameters
    ----------
    path : Path
        The folder; must hold nothing, unless it is gone on with.
    config : RunConfig
        The resolved configuration, written as config.toml.
    adapter_bytes : int
        Size of the adapter.
    details : mapping, optional
        Further facts for environment.json, such as a preset's provenance.
    lock : RunLock, optional
        Of a run that goes on: the folder is that run's. See `go_on`.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        adapter_bytes: int,
        details: Mapping[str, Any] | None = None,
        *,
        lock: RunLock | None = None,
    ) -> None:
        self.path, self._keeps = path, config.run.keep_checkpoints
        self._pending: list[str] = []
        self._problems: list[str] = []
        self._lacks_checkpoints = False  # which was said
        self._lock, self._reserves = lock, False
        needed = adapter_bytes * (self._keeps + 3) + (16 << 20)
        try:
            if lock is None:
                check_vacant(path)
                path.mkdir(parents=True, exist_ok=True)
                self._lock = RunLock(path)
                check_vacant(path)  # nobody else can make a run of it any more
            free = shutil.disk_usage(path).free
            if free < needed:
                raise RunDirectoryError(
                    f"'{path}' has {free / 1e6:.0f} MB free, and the run may write {needed / 1e6:.0f} MB; "
                    "make room, or give another --out."
                )
            if lock is None:
                facts = environment() | {"seed": config.run.seed} | dict(details or {})
                self._write_facts(config, facts)
                (path / EVENTS_FILE).touch()
            self._reserve(adapter_bytes * 2 + (1 << 20))
        except OSError as error:
            self.close()
            raise RunDirectoryError(f"cannot write the run directory '{path}': {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the space that was reserved, and let others write."""
        if self._reserves:
            with contextlib.suppress(OSError):
                self._reserved.unlink(missing_ok=True)
            self._reserves = False
        if self._lock is not None:
            self._lock.release()

    def go_on(
        self,
        config: RunConfig,
        server_round: int,
        events: int,
        outdated: Iterable[str] = (),
    ) -> None:
        """Take the folder back to how it was after a round, and note that the run goes on from there.

        Parameters
        ----------
        config : RunConfig
            As the run goes on.
        server_round : int
            0 for the beginning.
        events : int
            Bytes of metrics.jsonl that were written by then: what follows is recomputed.
        outdated : iterable of str
            Names in the folder of what was stated at an end that is none any more.

        Raises
        ------
        RunDirectoryError
            It cannot be written.
        """
        facts = read_object(self.path / ENVIRONMENT_FILE)
        now = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "round": server_round, "machine": environment()}
        before = facts.get(RESUMES)
        facts[RESUMES] = [*(before if isinstance(before, list) else ()), now | {"rounds": config.federation.rounds}]
        try:
            self._write_facts(config, facts)
            with (self.path / EVENTS_FILE).open("a+b") as file:
                file.truncate(min(events, file.tell()))
            for name in outdated:
                (self.path / name).unlink(missing_ok=True)
            for later in checkpoint_rounds(self.path):
                if later > server_round:
                    remove_checkpoint(self.path, later)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write the run directory '{self.path}': {error.strerror or error}"
            ) from None

    def add_facts(self, more: Mapping[str, Any]) -> None:
        """Add to environment.json what is known at the end alone; a run is not lost because that cannot be written."""
        with contextlib.suppress(OSError, RunDirectoryError):
            facts = read_object(self.path / ENVIRONMENT_FILE) | dict(more)
            write_whole(self.path / ENVIRONMENT_FILE, (to_json(facts, indent=2) + "\n").encode())

    def _write_facts(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write environment.json, and then config.toml: where that is there, it is a run, and the other is too."""
        write_whole(self.path / ENVIRONMENT_FILE, (to_json(facts, indent=2) + "\n").encode())
        write_whole(self.path / CONFIG_FILE, config.to_toml().encode())
        sync(self.path)

    @property
    def _reserved(self) -> Path:
        return self.path / RESERVED

    def _reserve(self, size: int) -> None:
        with open(open_own(self._reserved, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            self._reserves = True
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
            self._write_pending()
        except OSError as error:
            if len(self._pending) == 1:
                self._problems.append(
                    f"cannot write {EVENTS_FILE} ({error.strerror}); the events are kept and written later"
                )

    @property
    def events_size(self) -> int:
        """Bytes of metrics.jsonl, with the events that could not be written yet."""
        return (self.path / EVENTS_FILE).stat().st_size + sum(len(line.encode()) for line in self._pending)

    def _write_pending(self) -> None:
        data = "".join(self._pending).encode()
        with (self.path / EVENTS_FILE).open("ab", buffering=0) as file:  # a buffer would be written again at the close
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                self._pending.clear()
            except BaseException:
                os.truncate(self.path / EVENTS_FILE, size)  # half a line would spoil the file
                raise

    def checkpoint(self, server_round: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> list[int]:
        """Save the state of the run after a round, atomically, and behind all events so far.

        Parameters
        ----------
        server_round : int
            Which round is over.
        tensors : mapping of str to Tensor
            See `fedpeft.runs.checkpoints.Checkpoint`.
        facts : mapping
            See there.

        Returns
        -------
        list of int
            The rounds of which there are checkpoints now: the newest few.
        """
        from safetensors import SafetensorError

        for last_try in (False, True):
            try:
                self._write_pending()
                sync(self.path / EVENTS_FILE)
                write_checkpoint(self.path, Checkpoint(server_round, dict(tensors), dict(facts)))
            except (OSError, SafetensorError) as error:
                if not last_try and self._keep_checkpoints(1):  # there may be room now
                    continue
                if not self._lacks_checkpoints:
                    why = getattr(error, "strerror", None) or error
                    self._problems.append(f"no checkpoint of round {server_round}: {why}; later rounds try again")
                self._lacks_checkpoints = True
            else:
                self._lacks_checkpoints = False
                self._keep_checkpoints(self._keeps)
            break
        return checkpoint_rounds(self.path)

    def _keep_checkpoints(self, count: int) -> int:
        """Remove all checkpoints but the newest few; return how many that were."""
        gone = checkpoint_rounds(self.path)[:-count]
        for server_round in gone:
            remove_checkpoint(self.path, server_round)
        return len(gone)

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
        """Write the final adapter into the space reserved for it.

        Raises
        ------
        RunDirectoryError
            It does not fit; the newest checkpoint is left, from which the run can go on.
        """
        self._reserved.unlink(missing_ok=True)
        path = self.path / name
        try:
            save(path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._keep_checkpoints(1)
            try:
                save(path)
            except OSError as again:
                raise RunDirectoryError(
                    f"cannot write the adapter '{path}': {again.strerror or again}; make room, and go on with: "
                    f"fedpeft simulate --resume {shlex.quote(str(self.path))}"
                ) from None
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
        except (ValueError, RecursionError):  # half a line, or none that a run wrote
            break
    return events


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run directory; empty where there is none to be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
