"""FRoD: one basis for layers of the same sort, whose coordinates and few other entries are trained (PEFT's ``FrodConfig``)."""

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
