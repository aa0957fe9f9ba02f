"""The run directories in a folder, as ``fedpeft runs`` lists them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from fedpeft import tasks
from fedpeft.errors import FedpeftError, RunDirectoryError
from fedpeft.presets import PREFIX, is_preset
from fedpeft.report.formats import NONE, finite, number, one_line
from fedpeft.report.history import History
from fedpeft.report.layout import cell, new_table

if TYPE_CHECKING:
    from fedpeft.config import RunConfig

Facts = dict[str, Any]
ABANDONED_SECONDS = 3600.0  # at least this long without an event, and a run without an end is no longer called running


def runs_list(folder: Path, *, clock: Callable[[], float] = time.time) -> list[Facts]:
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
    from fedpeft.runs import CONFIG

    if not folder.is_dir():
        if folder == Path("runs"):
            return []
        raise RunDirectoryError(f"no folder '{folder}'. `fedpeft runs DIR` takes a folder that holds run directories.")
    try:
        candidates = [folder] if (folder / CONFIG).is_file() else sorted(folder.iterdir())
        found = [_run_facts(path, clock()) for path in candidates if (path / CONFIG).is_file()]
    except OSError as error:
        raise RunDirectoryError(f"cannot read '{folder}': {error.strerror or error}") from None
    return sorted(found, key=lambda facts: (facts["started"] or "", facts["name"]))


def _run_facts(path: Path, now: float) -> Facts:
    from fedpeft.runs import CONFIG, METRICS, read_config

    facts: Facts = {"name": path.resolve().name, "path": str(path), "state": "unreadable"}
    facts |= dict.fromkeys(("strategy", "task", "preset", "rounds", "planned", "metric", "first", "last", "started"))
    facts |= dict.fromkeys(("level", "epsilon", "guarantee", "problem"))
    try:
        facts["started"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / CONFIG).stat().st_mtime))
        config = read_config(path)
        history = History.read(path)
        written = (path / METRICS).stat().st_mtime if (path / METRICS).exists() else (path / CONFIG).stat().st_mtime
    except (FedpeftError, OSError, ValueError) as error:
        return facts | {"problem": one_line(error)}
    longest = max((finite(event.get("seconds")) or 0.0 for event in history.rounds.values()), default=0.0)
    state = history.state
    if state == "running" and now - written > max(ABANDONED_SECONDS, 5 * longest):
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
        **_privacy(config, history),
    }


def _privacy(config: RunConfig, history: History) -> Facts:
    """Return what the run stated at its end of its privacy, if it is private."""
    told = history.privacy
    if not config.privacy.is_private or told is None:
        return {}
    return {
        "level": config.privacy.level,
        "epsilon": finite(told.get("epsilon_max")),
        "guarantee": bool(told.get("guarantee")),
    }


def _preset(config: RunConfig) -> str | None:
    for value in (config.data.source, config.model.name):
        if is_preset(value):
            return value.removeprefix(PREFIX)
    return None


STATE_STYLES = {"completed": "green", "running": "cyan", "interrupted": "yellow"}


def runs_table(found: Sequence[Facts], folder: Path) -> RenderableType:
    """Lay out what `runs_list` returns."""
    if not found:
        return Text(f"no runs in '{one_line(folder)}'; `fedpeft simulate` makes one.")
    private = any(facts["level"] for facts in found)
    more = ("epsilon",) if private else ()
    table = new_table("run", "method and data", "rounds", "score", *more, right=("rounds", *more))
    for facts in found:
        run = Text.assemble((one_line(facts["name"]), "bold cyan"), "\n", (str(facts["started"] or NONE)[:16], "dim"))
        style = STATE_STYLES.get(facts["state"], "red")
        if facts["problem"]:
            rest = [cell(None)] * (1 + private)
            table.add_row(run, Text(facts["problem"], "dim"), Text(facts["state"], style), *rest)
            continue
        method = Text.assemble(one_line(facts["strategy"]), "\n", (one_line(facts["preset"] or facts["task"]), "dim"))
        rounds = Text.assemble(f"{facts['rounds']}/{facts['planned']}", "\n", (facts["state"], style))
        score = Text(NONE)
        if facts["metric"]:
            change = f"{number(facts['first'])} -> {number(facts['last'])}"
            score = Text.assemble(change, "\n", (facts["metric"], "dim"))
        table.add_row(run, method, rounds, score, *([_epsilon(facts)] if private else []))
    return table


def _epsilon(facts: Facts) -> Text:
    from fedpeft.report.privacy import epsilon  # which loads SciPy

    if not facts["level"]:
        return Text(NONE)
    remark = facts["level"] if facts["guarantee"] else "no guarantee"
    return Text.assemble(epsilon(facts["epsilon"]), "\n", (remark, "dim"))
