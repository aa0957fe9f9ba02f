"""OSF: trains the small singular directions of W, and holds them orthogonal to the great ones (arXiv 2504.07097).

W is ``U_high S_high V_high + U S V``, of which the second part is trained; gradients along the first are taken out.
``adapter.effective_rank`` is the number of directions that are kept, half of them if it is not given. The mean of
factors is not the factors of the mean. PEFT saves no kept part, and computes it of the base wherever it loads.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

OSF = Kind(
    name="osf",
    config="OSFConfig",
    update="neither",
    parts=("osf_",),
    conv1d=False,  # PEFT leaves such layers as they are, without a word
    rank=(),
    reads_base=True,
)
