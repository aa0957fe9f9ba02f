"""PEANuT: an update that a small network makes of W itself, W f(A) B (Y. Zhong et al., arXiv 2410.01870).

f are layers with a non-linearity between them, ``adapter.depth`` more than none; linear in B alone.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

PEANUT = Kind(
    name="peanut",
    config="PeanutConfig",
    update="neither",
    parts=("peanut_",),
    conv1d=False,
)
