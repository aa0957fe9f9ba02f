"""RoAd: pairs of outputs are turned in their plane and scaled (B. Liao and C. Monz, arXiv 2409.00119).

y = R (W0 x + b), where R turns each pair by an angle theta and scales it by alpha, both trained; not linear in theta.
Outputs are paired within groups of ``adapter.group_size``; ``adapter.variant`` is road_1, road_2 or road_4, with as
many angles and scales as its number says for two outputs.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.blocks import divides
from fedpeft.adapters.kinds.kind import Kind

ROAD = Kind(
    name="road",
    config="RoadConfig",
    update="neither",
    parts=("road_",),
    rank=(),
    conv1d=False,
    misfit=divides("group_size", outputs=True, even=True),
    quantised=True,
)
