"""FFA-LoRA: LoRA whose A stays as drawn, the same for all (Y. Sun et al., arXiv 2403.12313): s B A0 is linear in B."""

from __future__ import annotations

from dataclasses import replace

from fedpeft.adapters.kinds.kind import Role
from fedpeft.adapters.kinds.lora import LORA

FFA_LORA = replace(LORA, name="ffa-lora", inits=("default", "gaussian"), fixed=frozenset({Role.A}))
