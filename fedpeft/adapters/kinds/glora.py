"""GLoRA: ``W + W A + B`` and ``b + b D + E + C W`` (A. Chavan et al., arXiv 2306.07967), with PEFT's choice of forms."""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

GLORA = Kind(
    name="glora",
    config="GloraConfig",
    update="neither",
    parts=("glora_",),
    conv1d=False,
)
