"""Words of statements that reports use too; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def accountants(facts: Mapping[str, Any]) -> str:
    """Name who computed the numbers: RDP where PRV overflows, the exact formula where all take part in every step."""
    computed = facts.get("computed_by") or [facts["accountant"]]
    names = [computed] if isinstance(computed, str) else computed
    return " and ".join("the analytic Gaussian" if name == "gaussian" else str(name).upper() for name in names)
