"""LoRA: an update s B A (E. J. Hu et al., arXiv 2106.09685), and two that scale it otherwise.

* ``rslora`` scales by alpha / sqrt(r), so that a step's size does not shrink with the rank (D. Kalajdzievski, arXiv
  2312.03732).
* ``dora`` trains a magnitude of each output besides, which is multiplied with the normed sum of weight and update
  (S.-Y. Liu et al., arXiv 2402.09353); its update is no product.
"""

from __future__ import annotations

from dataclasses import replace

from fedpeft.adapters.kinds.kind import Kind, by_root_of_rank

LORA = Kind(
    name="lora",
    config="LoraConfig",
    update="product",
    parts=("lora_A", "lora_B"),
    alpha="lora_alpha",
    dropout="lora_dropout",
    init="init_lora_weights",
    settings={"use_rslora": False, "use_dora": False},
    inits=("default", "gaussian", "pissa", "olora", "eva", "lora-ga"),
    row_by_row=True,
    resizable=True,
    quantised=True,
    beyond_linear=True,
)
RSLORA = replace(LORA, name="rslora", settings={"use_rslora": True, "use_dora": False}, scaled=by_root_of_rank)
DORA = replace(
    LORA,
    name="dora",
    update="neither",
    parts=("lora_A", "lora_B", "lora_magnitude_vector"),
    settings={"use_rslora": False, "use_dora": True},
    inits=("default", "gaussian"),
    row_by_row=False,
    beyond_linear=False,
    quantised=False,  # PEFT loses the scales of bitsandbytes' 8 bits as it norms the weight
)
