"""What an audit found, as ``fedpeft privacy audit`` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.privacy.audit import downwards
from fedpeft.privacy.levels import find_level
from fedpeft.report.layout import pairs
from fedpeft.rounding import upwards


def audit_view(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `fedpeft.privacy.audit.audit_run` returns."""
    claimed, level = facts["claimed_epsilon"], find_level(facts["level"])
    why = "see privacy.json" if level.unit else f"privacy.level = {level.name}"
    rows = [
        ("claimed epsilon", f"none ({why})" if claimed is None else f"{upwards(claimed)} for each row"),
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


def white_box_view(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `fedpeft.privacy.white_box.white_box_audit` returns."""
    rows = [
        ("client", f"{facts['client']}, noise multiplier {facts['noise_multiplier']:.4g}"),
        (
            "one row moves a sum by",
            f"{facts['sensitivity']:.3f} of the clipping norm (before noise, the most of {facts['pairs']} batches)",
        ),
        (
            "told by noised sums",
            f"{facts['draws']} with the row, {facts['misses']} missed; {facts['draws']} without, "
            f"{facts['false_alarms']} false alarms",
        ),
        (
            "a step's mu is at least",
            f"{downwards(facts['mu_lower_bound'])} at {facts['confidence']:.0%} confidence, "
            f"and {facts['claimed_mu']:.4g} is claimed ({downwards(facts['most'])} if every guess were right)",
        ),
        (
            "epsilon of such a step",
            f"at least {downwards(facts['step_epsilon_lower_bound'])}, and {upwards(facts['claimed_step_epsilon'])} is "
            f"claimed, at delta {facts['delta']:g}",
        ),
        (
            "epsilon of all rounds",
            f"{downwards(facts['epsilon_lower_bound'])} if every step were so, and "
            f"{upwards(facts['planned_epsilon'])} as planned",
        ),
    ]
    return Group(pairs(rows), Text(), Text(facts["meaning"], style="bold red" if facts["violated"] else ""))
