"""GLoRA: W + W A + B, and for the bias b + b D + E + W C (A. Chavan et al., arXiv 2306.07967).

A, B and C are low-rank products, and D and E single numbers, unless ``config_A_B``, ``config_C`` and ``config_D_E``
under ``[adapter]`` say otherwise. C, D and E do nothing in a layer without bias.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

GLORA = Kind(
    name="glora",
    config="GloraConfig",
    update="neither",
    parts=("glora_",),
    conv1d=False,
)
