"""PEANuT: an update that a small network makes of W itself (PEFT's ``PeanutConfig``)."""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

PEANUT = Kind(
    name="peanut",
    config="PeanutConfig",
    update="neither",
    parts=("peanut_",),
    conv1d=False,
)
