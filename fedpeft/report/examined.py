"""What `fedpeft doctor` has found, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.formats import one_line
from fedpeft.report.layout import cell, new_table

STYLES = {"ok": "green", "slow": "yellow", "broken": "bold red"}
ENDS = {
    "ok": "Nothing is slow or short.",
    "slow": "Something is slow or short; runs will work.",
    "broken": "Something is broken: runs will fail.",
}


def findings_table(findings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Lay out findings.

    Parameters
    ----------
    findings : sequence of mapping
        Each as `fedpeft.runs.checks.Finding.to_dict` returns it.
    """
    table = new_table("", "what", "seen, and what to do", whole=("", "what"))
    for each in findings:
        words = Text(one_line(each["seen"], 2000))
        if each["advice"]:
            words.append(f"\n{one_line(each['advice'], 2000)}", "dim" if each["state"] == "ok" else "bold")
        table.add_row(Text(each["state"], STYLES[each["state"]]), cell(each["name"], "bold cyan"), words)
    return Group(table, Text(), Text(ENDS[worst(findings)], "dim"))


def worst(findings: Sequence[Mapping[str, Any]]) -> str:
    """Return the worst state of all; that of nothing is ok."""
    return max((str(each["state"]) for each in findings), key=list(STYLES).index, default="ok")
