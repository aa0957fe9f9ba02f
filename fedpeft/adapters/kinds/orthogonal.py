"""Adapters that turn the inputs of a layer, W = W0 Q with an orthogonal Q; neither linear nor a product.

* ``oft``: Q is block diagonal, each block the Cayley transform of a skew matrix (Z. Qiu et al., arXiv 2306.07280).
  ``adapter.oft_block_size`` is their size. PEFT would take another size where it does not divide the inputs; here that
  is an error. By default the transform is cut off after a few terms (``adapter.use_cayley_neumann``).
* ``boft``: as OFT, and a trained scale of each output (W. Liu et al., arXiv 2311.06243). The paper multiplies several
  such Q whose blocks are shuffled, as butterflies. PEFT does so only where it can compile a CUDA extension and else
  takes one without a word; for clients to agree, it is always one here.
* ``hra``: Q is a product of r Householder reflections (S. Yuan et al., arXiv 2405.17484). They begin in equal pairs,
  which cancel; with an odd rank they cannot, and the model begins turned.

The mean of the parameters is that of no Q, but it is itself an orthogonal adapter.
"""

from __future__ import annotations

from typing import Any

from fedpeft.adapters.kinds.blocks import divides
from fedpeft.adapters.kinds.kind import Kind, drawn_if_asked


def odd_or_asked(settings: Any) -> bool:
    """Tell whether reflections begin without partners that undo them."""
    return bool(settings.r % 2) or drawn_if_asked(settings)


OFT = Kind(
    name="oft",
    config="OFTConfig",
    update="neither",
    parts=("oft_",),
    rank=(),
    settings={"r": 0},
    conv1d=False,
    misfit=divides("oft_block_size", inputs=True),
    quantised=True,
)
BOFT = Kind(
    name="boft",
    config="BOFTConfig",
    update="neither",
    parts=("boft_",),
    rank=(),
    settings={"boft_block_num": 0, "boft_n_butterfly_factor": 1},
    conv1d=False,
    misfit=divides("boft_block_size", inputs=True),
    quantised=True,
)
HRA = Kind(
    name="hra",
    config="HRAConfig",
    update="neither",
    parts=("hra_",),
    conv1d=False,
    reads_base=True,
    moved=odd_or_asked,
)
