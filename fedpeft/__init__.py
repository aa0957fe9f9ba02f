"""Federated fine-tuning of transformers with LoRA adapters: simulate on Ray, deploy on Flower.

The names that users need, imported when they are asked for, so that ``import fedpeft`` costs nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from fedpeft.deferred import FLOWERS_OWN, defer

# OpenMP reads this once, when torch is loaded. Threads that spin while they wait made an evaluation on two busy cores
# take 43 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if FLOWERS_OWN & sys.modules.keys():
    defer()

if TYPE_CHECKING:
    from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
    from fedpeft.config import RunConfig, configure
    from fedpeft.errors import FedpeftError
    from fedpeft.simulations.simulate import resume, simulate
    from fedpeft.strategies import STRATEGIES, AdapterStrategy

__all__ = [
    "STRATEGIES",
    "AdapterState",
    "AdapterStrategy",
    "ClientUpdate",
    "FedpeftError",
    "LoraFactors",
    "RunConfig",
    "configure",
    "resume",
    "simulate",
]

_HOMES = {
    "STRATEGIES": "fedpeft.strategies",
    "AdapterState": "fedpeft.adapters.state",
    "AdapterStrategy": "fedpeft.strategies",
    "ClientUpdate": "fedpeft.adapters.state",
    "FedpeftError": "fedpeft.errors",
    "LoraFactors": "fedpeft.adapters.state",
    "RunConfig": "fedpeft.config",
    "configure": "fedpeft.config",
    "resume": "fedpeft.simulations.simulate",
    "simulate": "fedpeft.simulations.simulate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedpeft' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
