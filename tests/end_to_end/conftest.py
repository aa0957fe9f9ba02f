"""A real Flower federation on this machine: one SuperLink and some SuperNodes, as processes, on 127.0.0.1 only."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

CONNECTION = "loopback"
MARK = "FEDPEFT_LOOPBACK"


@dataclass(frozen=True)
class FinishedRun:
    """How a run ended.

    Parameters
    ----------
    run_id : str
        Flower's number of the run.
    status : str
        ``finished:completed``, ``finished:failed`` or ``finished:stopped``.
    details : str
        What Flower says of a failure: the server app's exception.
    server_log : str
        What the server app printed, as ``flwr log`` gives it.
    """

    run_id: str
    status: str
    details: str
    server_log: str


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, below those that systems give to outgoing connections meanwhile."""
    draw, found = random.SystemRandom(), set[int]()
    while len(found) < count:
        with socket.socket() as sock, contextlib.suppress(OSError):
            port = draw.randrange(15_000, 32_000)
            sock.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


class LoopbackFederation:
    """A SuperLink and its SuperNodes; nothing of them is left when the context ends.

    Parameters
    ----------
    directory : Path
        Where working directories, Flower's homes and logs go: one folder a process.
    node_configs : sequence of str
        ``--node-config`` of each SuperNode.
    environment : mapping of str to str
        Added to what the processes inherit.
    """

    def __init__(
        self, directory: Path, node_configs: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.node_configs = list(node_configs)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._mark = uuid.uuid4().hex
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        self._environment = inherited | {
            # the commands start each other by name
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "PYTHONUNBUFFERED": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            MARK: self._mark,
            **(environment or {}),
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, app: Path, *overrides: str, timeout: float = 900.0) -> FinishedRun:
        """Hand the app folder to ``flwr run`` and wait for the run's end.

        Parameters
        ----------
        app : Path
            Folder with a pyproject.toml.
        *overrides : str
            ``section.key=value``, as ``flwr run --run-config`` takes them.
        timeout : float
            Seconds until an AssertionError with every log is raised.
        """
        words = [word for override in overrides for word in ("--run-config", override)]
        started = self._flwr("run", str(app), CONNECTION, *words)
        assert started["success"], started["error-message"]
        run_id = str(started["run-id"])
        deadline = time.monotonic() + timeout
        # streams until the run ends: far cheaper than a new `flwr ls` every second
        log = self._command("log", run_id, CONNECTION, "--stream", timeout=timeout)
        while True:
            (run,) = self._flwr("ls", CONNECTION, "--run-id", run_id)["runs"]
            if run["status"].startswith("finished"):
                return FinishedRun(run_id, run["status"], run["status-details"], log)
            assert time.monotonic() < deadline, f"run {run['status']} after {timeout:.0f} s\n{log}\n{self.logs()}"
            time.sleep(1.0)

    def log(self, name: str) -> str:
        """Return what the process ``superlink``, ``node-0``, ``node-1``... has printed, its apps' output included."""
        return (self.directory / name / "log.txt").read_text(errors="replace")

    def logs(self) -> str:
        """Return all logs, to be read by people."""
        names = ["superlink", *(f"node-{index}" for index in range(len(self.node_configs)))]
        return "\n".join(f"--- {name}\n{self.log(name)}" for name in names)

    def _start(self) -> None:
        link, *nodes = free_ports(1 + len(self.node_configs))
        address = f"127.0.0.1:{link}"
        home = self.directory / "user" / "flwr"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n')
        here = ("--insecure", "--host", "127.0.0.1")
        self._launch("superlink", "flower-superlink", *here, "--port", str(link))
        for index, (port, config) in enumerate(zip(nodes, self.node_configs, strict=True)):
            words = ("--superlink", address, "--port", str(port), "--node-config", config)
            self._launch(f"node-{index}", "flower-supernode", *here, *words)
        deadline = time.monotonic() + 900.0
        while True:
            for process in self._processes:
                assert process.poll() is None, f"{process.args!r} exited with {process.returncode}\n{self.logs()}"
            listed = self._flwr("supernode", "list", CONNECTION)
            online = sum(node["status"] == "online" for node in listed.get("nodes", ()))
            if online == len(self.node_configs):
                return
            assert time.monotonic() < deadline, f"{online} of {len(self.node_configs)} nodes online\n{self.logs()}"
            time.sleep(0.5)

    def _launch(self, name: str, *command: str) -> None:
        directory = self.directory / name
        directory.mkdir(parents=True)
        with (directory / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=directory,
                env=self._environment | {"FLWR_HOME": str(directory / "flwr")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def _command(self, *words: str, timeout: float = 900.0) -> str:
        """Return what ``flwr`` prints, cut off after `timeout` seconds."""
        directory = self.directory / "user"
        with (directory / "output.txt").open("w+b") as output, (directory / "errors.txt").open("wb") as errors:
            process = subprocess.Popen(
                ["flwr", *words],
                cwd=directory,
                env=self._environment | {"FLWR_HOME": str(directory / "flwr")},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
            output.seek(0)
            return output.read().decode(errors="replace")

    def _flwr(self, *words: str) -> dict[str, Any]:
        printed = self._command(*words, "--format", "json")
        try:
            answer = json.loads(printed)
        except json.JSONDecodeError:
            errors = (self.directory / "user" / "errors.txt").read_text(errors="replace")
            raise AssertionError(f"flwr {' '.join(words)}: {printed}\n{errors}") from None
        assert isinstance(answer, dict)
        return answer

    def _stop(self) -> None:
        # nodes first: they take leave of a SuperLink that still answers
        for group in (self._processes[1:], self._processes[:1]):
            for process in group:
                process.terminate()
            for process in group:
                try:
                    process.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._processes.clear()
        # the apps' processes watch their parents and leave by themselves; those that hang get no choice
        deadline = time.monotonic() + 120.0
        while remaining := self._remaining():
            assert time.monotonic() < deadline, f"processes {remaining} cannot be ended"
            for pid in remaining:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def _remaining(self) -> list[int]:
        """Return every process that inherited this federation's mark, whatever its parent or session."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
            except OSError:
                continue
        return found


@pytest.fixture
def loopback(tmp_path: Path) -> Callable[..., LoopbackFederation]:
    """Return ``loopback(node_configs, environment=None)``, a context: a federation in the test's own folder."""
    numbers = itertools.count()

    def federation(node_configs: Sequence[str], environment: Mapping[str, str] | None = None) -> LoopbackFederation:
        return LoopbackFederation(tmp_path / f"federation-{next(numbers)}", node_configs, environment)

    return federation
