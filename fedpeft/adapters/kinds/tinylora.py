"""TinyLoRA: a few numbers between singular vectors of W (J. X. Morris et al., arXiv 2602.04118).

``U diag(S) (sum_i v_i P_i) V^T``: U, S and V are of the frozen weight, the P_i are drawn from the run's seed, and the
vector v of a layer, or of several where ``adapter.weight_tying`` is over zero, is all that is trained.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

TINYLORA = Kind(
    name="tinylora",
    config="TinyLoraConfig",
    update="linear",
    parts=("tinylora_",),
    dropout="tinylora_dropout",
    seed="projection_seed",
    settings={"save_projection": True},
    reads_base=True,
)
