"""PSOFT: turns the principal part of W by an orthogonal matrix (F. Wu et al., arXiv 2505.11235).

``B (diag(b) R diag(a) - I) A`` with A and B from the singular vectors of W, R a Cayley transform of what is trained
and a, b two scalings; no mean is exact. PEFT saves no A and B: they are made of the base again.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

PSOFT = Kind(
    name="psoft",
    config="PsoftConfig",
    update="neither",
    parts=("psoft_",),
    conv1d=False,
    alpha="psoft_alpha",
    dropout="psoft_dropout",
    seed="random_seed",
    reads_base=True,
)
