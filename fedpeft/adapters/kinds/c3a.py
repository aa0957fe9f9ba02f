"""C3A: blocks that are circulant matrices, one row trained of each (A. Chen et al., arXiv 2407.19342).

Block (i, j) of the update is circ(w_ij) / d_in, applied by Fourier transforms; linear in what is trained. The blocks
are ``adapter.block_size`` wide and high. PEFT begins at random values, and so does the model;
``adapter.init_weights=true`` begins at zero.
"""

from __future__ import annotations

from typing import Any

from fedpeft.adapters.kinds.blocks import divides
from fedpeft.adapters.kinds.kind import Kind


def moved(settings: Any) -> bool:
    """Tell whether it begins at random values."""
    return settings.init_weights is not True


C3A = Kind(
    name="c3a",
    config="C3AConfig",
    update="linear",
    parts=("c3a_",),
    rank=(),
    conv1d=False,
    misfit=divides("block_size", outputs=True, inputs=True),
    moved=moved,
    quantised=True,
)
