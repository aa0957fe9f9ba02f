"""FRoD: one basis for all layers of a name, and a full-rank update in it (G. Wan et al., arXiv 2512.23485).

W is ``U diag(l) V``, V of all layers of that name together; trained are l and few entries S beside the diagonal,
in places that the run's seed draws, so that W becomes ``U (diag(l) + S) V``. PEFT saves V and the places, and computes
U of the base wherever it loads.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

FROD = Kind(
    name="frod",
    config="FrodConfig",
    update="linear",
    parts=("frod_",),
    rank=(),
    dropout="frod_dropout",
    seed="projection_prng_key",
    settings={"save_projection": True, "progressbar": False},
    reads_base=True,
)
