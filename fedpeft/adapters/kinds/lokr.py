"""LoKr: a Kronecker product of factors (S.-Y. Yeh et al., LyCORIS, arXiv 2309.14859).

PEFT drops ranks of it, never inputs.
"""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Kind

LOKR = Kind(name="lokr", config="LoKrConfig", update="neither", parts=("lokr_",), alpha="alpha", conv1d=False)
