"""HiRA: LoRA's product times the weight, entry by entry (Q. Huang et al., ICLR 2025).

W = W0 + W0 * (B A); the rank of the update is not bounded by r. No scaling, and a product of what is trained, so a mean
of factors is not the mean of updates.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

HIRA = Kind(
    name="hira",
    config="HiraConfig",
    update="neither",
    parts=("hira_",),
    dropout="hira_dropout",
)
