"""AdaMSS: clusters of W's principal directions, each with low-rank factors of its own (PEFT's ``AdamssConfig``)."""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

ADAMSS = Kind(
    name="adamss",
    config="AdamssConfig",
    update="neither",
    parts=("adamss_",),
    conv1d=False,
    seed="random_seed",
    settings={"use_asa": False},
    reads_base=True,
)
