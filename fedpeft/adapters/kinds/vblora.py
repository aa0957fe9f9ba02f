"""VB-LoRA: B and A put together from shares of one bank of vectors (Y. Li et al., arXiv 2405.15179).

Every sub-vector of a layer's A and B is a softmax over its k largest logits, times those vectors of the bank. The bank
is one tensor for the whole model and travels once; a mean of logits may choose other vectors than any client did.
``adapter.vector_length`` must divide every side of the adapted layers (256 in PEFT).
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind, always

VBLORA = Kind(
    name="vblora",
    config="VBLoRAConfig",
    update="neither",
    parts=("vblora_",),
    dropout="vblora_dropout",
    settings={"save_only_topk_weights": False},  # of which no mean could be taken
    moved=always,
    quantised=True,
)
