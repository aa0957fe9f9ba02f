"""LoHa: the entrywise product of two products (N. Hyeon-Woo et al., arXiv 2108.06098).

PEFT drops ranks of it, never inputs.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

LOHA = Kind(name="loha", config="LoHaConfig", update="neither", parts=("hada_",), alpha="alpha", conv1d=False)
