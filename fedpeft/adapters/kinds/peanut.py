"""PEANuT: an update that a small network makes of W itself, act(W^T A) B (Y. Zhong et al., arXiv 2410.01870).

Between them stand layers with a non-linearity each, ``adapter.depth`` more than none; linear in B alone.
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
