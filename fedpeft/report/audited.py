"""What an audit by canaries found, as ``fedpeft privacy audit`` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.privacy.audit import downwards
from fedpeft.privacy.rounding import number
from fedpeft.report.layout import pairs


def audit_view(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `fedpeft.privacy.audit.audit_run` returns."""
    claimed, level = facts["claimed_epsilon"], facts["level"]
    why = "privacy.level = none" if level == "none" else "see privacy.json"
    rows = [
        ("claimed epsilon", f"none ({why})" if claimed is None else f"{number(claimed)} for each row"),
        ("delta", f"{facts['delta']:g}"),
        ("canaries", f"{facts['canaries']}, of which {facts['included']} were trained on"),
        ("guesses", f"{facts['guesses']}, of which {facts['correct']} were right"),
        (
            "epsilon is at least",
            f"{downwards(facts['epsilon_lower_bound'])} at {facts['confidence']:.0%} confidence "
            f"({downwards(facts['most'])} if every guess were right)",
        ),
    ]
    return Group(pairs(rows), Text(), Text(facts["meaning"], style="bold red" if facts["violated"] else ""))
