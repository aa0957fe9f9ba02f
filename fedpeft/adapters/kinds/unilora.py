"""Uni-LoRA: all of LoRA's numbers from one short vector, theta_D = P theta_d (K. Li et al., arXiv 2506.00799).

Each entry of every B and A is an entry of theta_d, which one the run's seed draws, divided by the root of how many
share it; B A is quadratic in theta_d. The vector is one tensor for the whole model and travels once.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind, always

UNILORA = Kind(
    name="unilora",
    config="UniLoraConfig",
    update="neither",
    parts=("unilora_",),
    dropout="unilora_dropout",
    seed="proj_seed",
    settings={"save_indices": False},  # whoever knows the seed draws them again
    moved=always,
)
