"""Bases that were saved by GPTQ (E. Frantar et al., arXiv 2210.17323): it looks at rows, and is not done here.

Needs the package gptqmodel; no such base was run here.
"""

from __future__ import annotations

from fedpeft.quantization.record import Quantization, by_asking, of_class

GPTQ = Quantization(
    name="gptq",
    bits=4.15,
    library="gptqmodel",
    pip="gptqmodel optimum",
    saved="gptq",
    recognises=lambda saved: True,
    holds=of_class("gptqmodel", "BaseQuantLinear"),
    dequantise=by_asking,
)
