"""OSF: trains W's small singular directions, held orthogonal to the great ones (PEFT's ``OSFConfig``)."""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

OSF = Kind(
    name="osf",
    config="OSFConfig",
    update="neither",
    parts=("osf_",),
    rank=(),
    reads_base=True,
)
