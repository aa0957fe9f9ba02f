"""Bases that were saved by AWQ (J. Lin et al., arXiv 2306.00978): it looks at rows, and is not done here.

Needs the package gptqmodel; no such base was run here.
"""

from __future__ import annotations

from fedpeft.quantization.record import Quantization, by_asking, of_class

AWQ = Quantization(
    name="awq",
    bits=4.15,
    library="gptqmodel",
    pip="gptqmodel",
    saved="awq",
    recognises=lambda saved: True,
    holds=of_class("gptqmodel", "AWQuantLinear"),
    dequantise=by_asking,
)
