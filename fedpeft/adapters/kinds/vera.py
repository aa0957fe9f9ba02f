"""VeRA: diag(b) B diag(d) A with one random A and B for all layers (D. J. Kopiczko et al., arXiv 2310.11454)."""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

VERA = Kind(
    name="vera",
    config="VeraConfig",
    update="neither",
    parts=("vera_",),
    dropout="vera_dropout",
    seed="projection_prng_key",
    quantised=True,
)
