"""SIGKILL at random moments, of a run's process and of its workers: what comes out is compared to the byte.

    python -m benchmarks.kills [--kills 20] [--only KIND] [--quick] [--json FILE]

A run is killed, resumed and
killed again until it ends, then begun anew until there were enough kills. Adapter and events (but for times) must be
those of a run that nobody disturbed, whatever is killed and whenever. Under record-level privacy the ledger must hold
every charge that the undisturbed run made; with secure randomness, at least as many as rounds were trained. A figure is
how many kills came to nothing; anything that differs is the exit code 1.

Every run is a fork of this process, which has loaded libraries, model and rows before: so that what is killed is a run,
and not its preparation.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.peer import small
from benchmarks.record import Figure, machine, parser, publish
from fedpeft.config import RunConfig, configure
from fedpeft.privacy.ledger import LEDGER, read_entries
from fedpeft.resident import resident
from fedpeft.runs import CONFIG_FILE, EVENTS_FILE
from fedpeft.simulations.resuming import is_complete
from fedpeft.simulations.simulate import resume, simulate

SETTINGS: dict[str, object] = {
    "strategy.name": "fedit",
    "strategy.server_optimizer": "adam",
    "federation.clients": 4,
    "federation.fraction": 0.5,
    "federation.rounds": 6,
    "train.local_steps": 2,
    "train.batch_size": 8,
    "simulation.workers": 0,
}
RECORD: dict[str, object] = {"privacy.level": "record", "privacy.noise_multiplier": 1.0, "run.evaluate_every": 6}
KINDS: dict[str, tuple[str, Mapping[str, object]]] = {
    "driver": ("driver", {}),
    "driver, personal heads and B": ("driver", {"strategy.name": "fedsa-lora"}),
    "driver, record level, seeded": ("driver", RECORD),
    "driver, record level, secure": ("driver", {**RECORD, "privacy.rng": "secure"}),
    "workers": ("workers", {"simulation.workers": 2, "train.local_steps": 20}),
}
PATIENCE = 600.0  # seconds, after which a run hangs


@dataclass
class Found:
    """What came of one kind of kill."""

    what: str
    kills: int = 0
    survived: int = 0
    runs: int = 0
    charges_least: int = 0
    charges_found: int = 0

    def figure(self, wanted: int) -> Figure:
        """Return how many of the kills changed nothing."""
        detail = {"runs": self.runs}
        if self.charges_least:
            detail |= {"charges_least": self.charges_least, "charges_found": self.charges_found}
        return Figure(f"{self.what}: as without kills", self.survived, f"of {self.kills}", wanted, detail=detail)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, resume, compare, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--kills", type=int, default=20, help="of each kind")
    given_options.add_argument("--only", choices=sorted(KINDS), action="append", help="these kinds alone")
    given_options.add_argument("--seed", type=int, default=0, help="of the moments")
    given_options.add_argument("--config", type=Path, help="another model and other rows than the digits preset's")
    given = given_options.parse_args(arguments)
    before = machine()
    torch.set_num_threads(1)  # threads do not survive a fork
    found = []
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as place:
        folder = Path(place)
        if given.quick:
            given.kills, given.only, given.config = 1, ["driver"], folder / "tiny.toml"
            given.config.write_text(small(folder).config().to_toml())
        for index, what in enumerate(given.only or KINDS):
            config = configured(KINDS[what][1], given.config)
            found.append(stress(what, config, given.kills, folder / str(index), given.seed))
    publish("kills", [each.figure(given.kills) for each in found], given, before)
    if broken := [each.what for each in found if each.survived < each.kills]:
        raise SystemExit(f"not as without kills: {', '.join(broken)}")


def configured(settings: Mapping[str, object], file: Path | None = None) -> RunConfig:
    """Make the run of a kind, on the digits or as a file says."""
    own = {**SETTINGS, **settings}
    if own["strategy.name"] != SETTINGS["strategy.name"]:
        del own["strategy.server_optimizer"]
    return configure(own, preset="digits" if file is None else None, file=file)


def stress(what: str, config: RunConfig, kills: int, folder: Path, seed: int) -> Found:
    """Kill runs of one configuration until there were enough kills, and compare each that comes to its end."""
    draw, found = random.Random(f"{seed} {what}"), Found(what)
    resident(config).adapted  # noqa: B018 - loaded before there are forks
    begun = time.monotonic()
    whole = folder / "whole"
    _finish(_started(lambda: simulate(config, whole)))
    seconds = time.monotonic() - begun
    strike = kill_workers if KINDS[what][0] == "workers" else kill_driver
    while found.kills < kills:
        found.runs += 1
        killed_before = found.kills
        run = folder / f"run-{found.runs}"
        while not (run.is_dir() and (run / CONFIG_FILE).is_file() and is_complete(run, config)):
            left = kills - found.kills
            process = _started(lambda: resume(run) if (run / CONFIG_FILE).is_file() else simulate(config, run))  # noqa: B023
            found.kills += strike(process, draw, seconds, left)
        if _judge(found, config, whole, run):
            found.survived += found.kills - killed_before
        print(f"{what}: {found.kills} kills, {found.runs} runs", file=sys.stderr, flush=True)
    return found


def kill_driver(process: Any, draw: random.Random, seconds: float, left: int) -> int:
    """Kill a run once at a random moment, if it has not ended by then; return how often it was killed."""
    if left > 0:
        process.join(draw.uniform(0, 0.7 * seconds))
        if process.is_alive():
            process.kill()
            process.join()
            return 1
    _finish(process)
    return 0


def kill_workers(process: Any, draw: random.Random, seconds: float, left: int) -> int:
    """Kill one worker after another at random moments; return how many."""
    killed = 0
    while killed < left:
        process.join(draw.uniform(0, 0.3 * seconds))
        if not process.is_alive():
            break
        workers = [child for child in _children(process.pid) if "Worker" in child[1]]
        if workers:
            pid, _ = draw.choice(workers)
            try:
                psutil.Process(pid).send_signal(signal.SIGKILL)
                killed += 1
            except psutil.NoSuchProcess:
                continue
    _finish(process)
    return killed


def _children(pid: int) -> list[tuple[int, str]]:
    """Return the Ray actors below a process, and their titles."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::"):
            found.append((child.pid, title))
    return found


def _started(job: Callable[[], Any]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    return process


def _finish(process: Any) -> None:
    process.join(PATIENCE)
    if process.exitcode != 0:
        process.kill()
        raise SystemExit(f"a run ended with {process.exitcode}")


def _judge(found: Found, config: RunConfig, whole: Path, run: Path) -> bool:
    """Tell whether a run that was killed came out as the one that was not."""
    secure = config.privacy.rng == "secure"
    adapter = Path("adapter/adapter_model.safetensors")
    alike = [path.relative_to(whole) for path in whole.glob("clients/*/adapter/*.safetensors")]
    passed = secure or (  # whose numbers nobody can draw again
        all((whole / name).read_bytes() == (run / name).read_bytes() for name in (adapter, *alike))
        and timeless(whole) == timeless(run)
    )
    if config.privacy.is_private:
        least, charged = (
            sorted((entry.client, entry.round) for entry in read_entries(path / LEDGER)) for path in (whole, run)
        )
        found.charges_least, found.charges_found = len(least), len(charged)
        passed &= charged == least if not secure else set(charged) >= set(least)
    return passed


def timeless(run: Path) -> list[dict[str, Any]]:
    """Return a run's events without what is measured by a clock."""
    lines = (run / EVENTS_FILE).read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


if __name__ == "__main__":
    main()
