"""The run directories in a folder: what each is, how far it came, and whether it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.errors import FedpeftError, RunDirectoryError
from fedpeft.formats import finite, one_line
from fedpeft.presets import PREFIX, is_preset
from fedpeft.runs.checkpoints import resumable_round
from fedpeft.runs.directory import CONFIG_FILE, ENVIRONMENT_FILE, EVENTS_FILE, SIMULATED, read_config, read_object
from fedpeft.runs.history import History
from fedpeft.runs.lock import is_held

Facts = dict[str, Any]
ABANDONED_SECONDS = 3600.0  # at least this long without an event, and a run without an end is no longer called running


def list_runs(folder: Path, *, clock: Callable[[], float] = time.time) -> list[Facts]:
    """Describe the run directories in a folder, the oldest first.

    What holds no config.toml is no run and is passed over; a run that cannot be read is listed with the reason.

    Parameters
    ----------
    folder : Path
        Such as ``runs``; or one run directory.
    clock : callable
        Seconds since 1970, to tell a running run from one that was killed.

    Raises
    ------
    RunDirectoryError
        No such folder; a missing ``runs`` is an empty list.
    """
    if not folder.is_dir():
        if folder == Path("runs"):
            return []
        raise RunDirectoryError(f"no folder '{folder}'. `fedpeft runs DIR` takes a folder that holds run directories.")
    try:
        candidates = [folder] if (folder / CONFIG_FILE).is_file() else sorted(folder.iterdir())
        listed = [_run_facts(path, clock()) for path in candidates if (path / CONFIG_FILE).is_file()]
    except OSError as error:
        raise RunDirectoryError(f"cannot read '{folder}': {error.strerror or error}") from None
    return sorted(listed, key=lambda facts: (facts["started"] or "", facts["name"]))


def _run_facts(path: Path, now: float) -> Facts:
    facts: Facts = {"name": path.resolve().name, "path": str(path), "state": "unreadable"}
    facts |= dict.fromkeys(("strategy", "task", "preset", "rounds", "planned", "metric", "first", "last", "started"))
    facts |= dict.fromkeys(("level", "epsilon", "guarantee", "problem", "resumable"))
    try:
        facts["started"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / CONFIG_FILE).stat().st_mtime))
        config = read_config(path)
        history = History.read(path)
        newest = path / EVENTS_FILE if (path / EVENTS_FILE).exists() else path / CONFIG_FILE
        written = newest.stat().st_mtime
    except (FedpeftError, OSError, ValueError) as error:
        return facts | {"problem": one_line(error)}
    longest = max((finite(event.get("seconds")) or 0.0 for event in history.rounds.values()), default=0.0)
    state = history.state
    held = is_held(path)
    if state == "running" and (now - written > max(ABANDONED_SECONDS, 5 * longest) if held is None else not held):
        state = "abandoned"
    metric = history.metric
    first, last = history.first or {}, history.last or {}
    return facts | {
        "state": state,
        "strategy": config.strategy.name,
        "task": tasks.named(config),
        "preset": _preset(config),
        "rounds": history.done,
        "planned": config.federation.rounds,
        "metric": metric,
        "first": finite(first.get(metric or "")),
        "last": finite(last.get(metric or "")),
        "resumable": None if held or state in ("running", "completed") else _resumable(path),
        **_privacy(config, history),
    }


def _resumable(path: Path) -> int | None:
    """Return the round after which a run can go on; None where its clients are elsewhere."""
    return resumable_round(path) if read_object(path / ENVIRONMENT_FILE).get(SIMULATED) else None


def _privacy(config: RunConfig, history: History) -> Facts:
    """Return what the run stated at its end of its privacy, if it is private."""
    claim = history.privacy
    if not config.privacy.is_private or claim is None:
        return {}
    return {
        "level": config.privacy.level,
        "epsilon": finite(claim.get("epsilon_max")),
        "guarantee": bool(claim.get("guarantee")),
    }


def _preset(config: RunConfig) -> str | None:
    for value in (config.data.source, config.model.name):
        if is_preset(value):
            return value.removeprefix(PREFIX)
    return None
