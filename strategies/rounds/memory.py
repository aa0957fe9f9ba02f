"""What the rounds to come depend on, as tensors and plain JSON: what a checkpoint holds of a run's server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedpeft.adapters.state import AdapterState

METHOD, MEAN, WATCHER = "method", "mean", "watcher"  # whose memory it is: the method's own, the private mean's ..
SCALINGS = "scalings"


@dataclass(frozen=True)
class Memory:
    """A run's memory after a round.

    Parameters
    ----------
    tensors : dict of str to Tensor
        The adapter under PEFT's names; other parts under ``part:name``.
    facts : dict
        Plain JSON.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a part, by their own names."""
        return {key.removeprefix(f"{name}:"): t for key, t in self.tensors.items() if key.startswith(f"{name}:")}

    def state(self) -> AdapterState:
        """Return the adapter, its layers and tensors in the order in which it had them: sums go by it."""
        parts = tuple(f"{part}:" for part in (METHOD, MEAN, WATCHER))
        tensors = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(parts)}
        scalings = self.facts[SCALINGS]
        sorted_by_name = AdapterState.from_tensors(tensors, 1.0)
        factors = {
            layer: replace(sorted_by_name.factors[layer], scaling=scaling) for layer, scaling in scalings.items()
        }
        dense = {name: tensor for name, tensor in tensors.items() if name in sorted_by_name.dense}
        return AdapterState(factors, dense, sorted_by_name.base)


def remember(state: AdapterState, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> Memory:
    """Put a memory together.

    Parameters
    ----------
    state : AdapterState
        That the next round begins with.
    parts : mapping of str to mapping of str to Tensor
        What others remember as tensors, by whose it is.
    facts : mapping
        Whatever else is remembered.
    """
    tensors = state.to_tensors()
    tensors |= {f"{part}:{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    scalings = {layer: factors.scaling for layer, factors in state.factors.items()}
    return Memory(tensors, {SCALINGS: scalings, **facts})
