"""MiSS: one matrix of rows that repeat over the inputs (J. Kang et al., arXiv 2409.15371); linear in what it trains."""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

MISS = Kind(
    name="miss",
    config="MissConfig",
    update="linear",
    parts=("miss_",),
    dropout="miss_dropout",
    conv1d=False,
    quantised=True,
)
