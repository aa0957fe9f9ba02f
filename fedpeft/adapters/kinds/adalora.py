"""AdaLoRA: s B diag(e) A (Q. Zhang et al., arXiv 2303.10512), of which no rank is pruned here.

Pruning is for the caller of PEFT's ``update_and_allocate``, whom nobody is. The step counts are for it, and must be
consistent; the orthogonality term would enter every loss, tests' too.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

ADALORA = Kind(
    name="adalora",
    config="AdaLoraConfig",
    update="neither",
    parts=("lora_A", "lora_B", "lora_E"),
    rank=("init_r", "target_r"),
    alpha="lora_alpha",
    dropout="lora_dropout",
    settings={"orth_reg_weight": 0.0, "total_step": 1, "tinit": 0, "tfinal": 0},
    quantised=True,
)
