"""An adapter kind of one's own: FFA-LoRA, whose A stays as drawn, scaled by alpha / sqrt(r).

    python examples/own_adapter_kind.py

A package names it under the entry point group `fedpeft.adapters` instead, and every command knows it.
"""

from dataclasses import replace

from fedpeft import configure, simulate
from fedpeft.adapters.kinds import KINDS, Role
from fedpeft.adapters.kinds.lora import RSLORA

OWN = replace(RSLORA, name="ffa-rslora", inits=("default",), fixed=frozenset({Role.A}))
KINDS.ours[OWN.name] = OWN

settings = {"adapter.kind": OWN.name, "strategy.name": "fedit", "federation.rounds": 3, "simulation.workers": 0}
outcome = simulate(configure(settings, preset="digits"))
print(f"{OWN.name}: accuracy {outcome.scores['accuracy']:.3f}, and averaging it is exact: {OWN.linear}")
