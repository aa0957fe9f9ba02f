"""The job that the engine is measured by: all-MiniLM on real text, eight clients, ten steps of 16 rows a round.

`simulated` runs it as a user does, by ``fedpeft simulate`` in a process of its own, from the command to its end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Peak
from fedpeft.config import RunConfig, configure
from fedpeft.resident import Resident

Settings = Mapping[str, Any]
LENGTH = 128  # tokens at most

# learning rate and schedule do not depend on how many rounds there will be: a job of ten begins with one of five
JOB: Settings = {
    "data.max_length": LENGTH,
    "train.local_steps": 10,
    "train.batch_size": 16,
    "train.learning_rate": 3e-3,
    "train.lr_schedule": "constant",
    "federation.clients": 8,
    "run.evaluate_every": 1,
}
STRATEGY = "fedit"  # FedAvg of both factors, which is what a plain application does


@dataclass(frozen=True)
class Work:
    """What is to be done: a configuration's preset, if it has one, and its settings.

    Parameters
    ----------
    settings : mapping
        By ``section.key``.
    preset : str, optional
        Embedded model and rows.
    """

    settings: Settings
    preset: str | None = None

    def config(self) -> RunConfig:
        """Return the configuration."""
        return configure(dict(self.settings), preset=self.preset)

    def home(self) -> Resident:
        """Return model, rows and who holds which, in this process."""
        return Resident(self.config())

    def but(self, **settings: Any) -> Work:
        """Return the same with other settings, ``__`` in place of the dot."""
        return Work(
            {**self.settings, **{key.replace("__", "."): value for key, value in settings.items()}}, self.preset
        )

    def words(self) -> list[str]:
        """Return what follows ``fedpeft simulate``."""
        given = [f"{key}={_word(value)}" for key, value in self.settings.items()]
        return [*(["--preset", self.preset] if self.preset else []), *given]


def _word(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def job(rounds: int, precision: str = "fp32") -> Work:
    """Return the job."""
    rest = {"strategy.name": STRATEGY, "federation.rounds": rounds, "train.precision": precision}
    return Work({**JOB, **rest}, "docstrings")


@dataclass(frozen=True)
class Simulated:
    """A run of ``fedpeft simulate``.

    Parameters
    ----------
    wall : float
        Seconds from the command to its end.
    events : list of dict
        What it printed; ``at`` is when, in seconds since the command.
    peak : int
        Bytes of memory of all its processes at the worst moment.
    driver : int
        Bytes of its own process, without Ray and the workers.
    """

    wall: float
    events: list[dict[str, Any]]
    peak: int
    driver: int

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    def clients_in(self, rounds: Collection[int]) -> int:
        """Return how many clients were trained in some rounds."""
        return sum(event["round"] in rounds for event in self.of("client"))

    @property
    def accuracy(self) -> dict[int, float]:
        """Accuracy on all test rows, by round."""
        return {event["round"]: event["accuracy"] for event in self.of("evaluate")}

    @property
    def at(self) -> dict[int, float]:
        """When each round had been scored."""
        return {event["round"]: event["at"] for event in self.of("evaluate")}

    def whole(self, rounds: int) -> float:
        """Return the seconds of a job of so many rounds: until then, and what comes after the last."""
        return self.at[rounds] + self.wall - max(self.at.values())


class CommandError(RuntimeError):
    """A command that was to be measured has failed."""


def simulated(work: Work) -> Simulated:
    """Run ``fedpeft simulate``, and listen."""
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        command = [sys.executable, "-m", "fedpeft", "simulate", "--json", "--out", f"{folder}/run", *work.words()]
        return listened(command, Path(folder))


def here(work: Work) -> Simulated:
    """Run the same in this process, which is quick and whose memory says nothing."""
    from fedpeft.simulations.simulate import simulate

    events: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        simulate(
            work.but(simulation__workers=0).config(),
            Path(folder) / "run",
            listener=lambda event: events.append({**event, "at": time.perf_counter() - started}),
        )
    return Simulated(time.perf_counter() - started, events, 1, 1)


def listened(command: list[str], folder: Path, **more: str) -> Simulated:
    """Run a command that prints lines of JSON, note when they come, and watch its memory."""
    started = time.perf_counter()
    with (
        (folder / "stderr").open("w+") as errors,
        subprocess.Popen(
            command,
            cwd=folder,  # not the checkout: its folder named fedpeft is not the whole package
            env={**os.environ, "HF_HUB_OFFLINE": "1", **more},
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdout is not None
        events = []
        with Peak(process.pid) as memory:
            for line in process.stdout:
                if line.startswith("{"):
                    events.append({**json.loads(line), "at": time.perf_counter() - started})
            process.wait()
        wall = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise CommandError(f"{' '.join(command)} ended with {process.returncode}:\n{errors.read()[-3000:]}")
    return Simulated(wall, events, memory.highest, memory.own)
