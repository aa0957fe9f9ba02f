"""GraLoRA: k x k blocks of the weight, each with a LoRA of its own (Y. Jung et al., arXiv 2505.20355).

Block (i, j) of the update is (alpha / (r + h)) B_ij A_ij of rank r / k, so that it has the parameters of LoRA of rank
r and up to k times its rank. ``adapter.gralora_k`` is k, which must divide r; ``adapter.hybrid_r`` adds a plain LoRA of
rank h. Each block is a product of two trained factors, so a mean of factors is not the mean of updates.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.blocks import divides
from fedpeft.adapters.kinds.kind import Kind

GRALORA = Kind(
    name="gralora",
    config="GraloraConfig",
    update="neither",
    parts=("gralora_",),
    alpha="alpha",
    dropout="gralora_dropout",
    misfit=divides("gralora_k", outputs=True, inputs=True),
    quantised=True,
)
