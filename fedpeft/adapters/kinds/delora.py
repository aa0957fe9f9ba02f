"""DeLoRA: a bound on the update apart from its direction (M. Bini et al., arXiv 2503.18225).

``lambda |W| / r sum_i b_i a_i^T / (|b_i| |a_i|)``: rank-one terms of norm one, and a trained strength for each layer.
It is linear in lambda alone.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

DELORA = Kind(
    name="delora",
    config="DeloraConfig",
    update="neither",
    parts=("delora_",),
    conv1d=False,
)
