"""The run directories in a folder, as ``fedpeft runs`` prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from fedpeft.formats import NONE, number, one_line
from fedpeft.report.layout import cell, new_table
from fedpeft.report.privacy import epsilon

Facts = Mapping[str, Any]
STATE_STYLES = {"completed": "green", "running": "cyan", "interrupted": "yellow"}


def runs_table(runs: Sequence[Facts], folder: Path) -> RenderableType:
    """Lay out what `fedpeft.runs.listing.list_runs` returns."""
    if not runs:
        return Text(f"no runs in '{one_line(folder)}'; `fedpeft simulate` makes one.")
    private = any(facts["level"] for facts in runs)
    more = ("epsilon",) if private else ()
    table = new_table("run", "method and data", "rounds", "score", *more, right=("rounds", *more))
    for facts in runs:
        run = Text.assemble((one_line(facts["name"]), "bold cyan"), "\n", (str(facts["started"] or NONE)[:16], "dim"))
        style = STATE_STYLES.get(facts["state"], "red")
        if facts["problem"]:
            rest = [cell(None)] * (1 + private)
            table.add_row(run, Text(facts["problem"], "dim"), Text(facts["state"], style), *rest)
            continue
        method = Text.assemble(one_line(facts["strategy"]), "\n", (one_line(facts["preset"] or facts["task"]), "dim"))
        rounds = Text.assemble(f"{facts['rounds']}/{facts['planned']}", "\n", (facts["state"], style))
        if (done := facts.get("resumable")) is not None:
            rounds.append(f"\nresumable at round {done}", "dim")
        score = Text(NONE)
        if facts["metric"]:
            change = f"{number(facts['first'])} -> {number(facts['last'])}"
            score = Text.assemble(change, "\n", (facts["metric"], "dim"))
        table.add_row(run, method, rounds, score, *([_epsilon(facts)] if private else []))
    return table


def _epsilon(facts: Facts) -> Text:
    if not facts["level"]:
        return Text(NONE)
    remark = facts["level"] if facts["guarantee"] else "no guarantee"
    return Text.assemble(epsilon(facts["epsilon"]), "\n", (remark, "dim"))
