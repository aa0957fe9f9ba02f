"""BEFT: a bias of each output, and nothing else (arXiv 2509.15974, as PEFT names it); linear in it.

The paper takes the value projections; here ``adapter.targets`` says which, query and value if unset. Where a layer has
no bias of its own, as in Llama, PEFT cannot merge it into the base.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

BEFT = Kind(
    name="beft",
    config="BeftConfig",
    update="linear",
    parts=("beft_",),
    rank=(),
    quantised=True,
    conv1d=False,
    merges=False,
)
