"""How a round's aggregation error is measured: exactly where that is cheap, else on a sample of the layers.

What is done follows from sizes, never from a clock, so that every machine records the same value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.seeds import generator
from fedpeft.strategies.algebra.factors import RoundErrors, client_weights, errors_of, stacked

MOST_FLOPS = 5e10  # for the products of a round's updates: a few seconds of one core
DENSE = 4  # a matrix of products is kept where the clients' factors would take so many times its bytes


class ErrorMeasure:
    """The aggregation error of one round, into which updates go as they arrive.

    Of few clients the factors are kept, as exactly as they are; of many, only the sum of their products.

    Parameters
    ----------
    state : AdapterState
        What the round begins with.
    cohort : int
        How many clients are asked.
    seed : int
        The run's; draws the layers that are measured where all would take too long.
    """

    def __init__(self, state: AdapterState, cohort: int, seed: int) -> None:
        self.layers = _affordable(state, cohort, seed)
        self._state = state
        self._factors: dict[str, list[LoraFactors]] = {}
        self._sums: dict[str, Tensor] = {}
        self._cohort: list[ClientUpdate] = []  # without tensors
        for layer in self.layers:
            f = state.factors[layer]
            rank, d_in, d_out = f.rank, f.A.shape[1], f.B.shape[0]
            if 4 * cohort * rank * (d_in + d_out) > DENSE * 8 * d_in * d_out:
                self._sums[layer] = torch.zeros(d_out, d_in, dtype=torch.float64)
            else:
                self._factors[layer] = []

    @property
    def is_sample(self) -> bool:
        """Whether layers are left out."""
        return len(self.layers) < len(self._state.factors)

    def add(self, update: ClientUpdate) -> None:
        """Take in an update."""
        self._cohort.append(ClientUpdate(update.client_id, update.num_examples, {}))
        for layer, kept in self._factors.items():
            kept.append(update.factors[layer])
        for layer, total in self._sums.items():
            f = update.factors[layer].plain()
            total.addmm_(f.B.double(), f.A.double(), alpha=f.scaling * update.num_examples)

    def errors(self, merged: AdapterState, offset: Mapping[str, LoraFactors]) -> RoundErrors:
        """Return how far what is sent now is from the mean of the products; see `errors_of`."""
        weights = client_weights(self._cohort)
        ideal: dict[str, LoraFactors | Tensor] = {}
        for layer in self.layers:
            if layer in self._sums:
                ideal[layer] = self._sums[layer] / sum(update.num_examples for update in self._cohort)
            else:
                ideal[layer] = stacked(self._factors[layer], weights)
        return errors_of(ideal, self._state, merged, offset)


def _affordable(state: AdapterState, cohort: int, seed: int) -> list[str]:
    """Return the layers that are measured, in the adapter's order: all, or the first of a shuffle that may be."""
    flops = {name: 2.0 * cohort * f.rank * f.A.shape[1] * f.B.shape[0] for name, f in state.factors.items()}
    if sum(flops.values()) <= MOST_FLOPS:
        return list(flops)
    names, chosen, spent = list(flops), set[str](), 0.0
    for place in generator(seed, "aggregation-error").permutation(len(names)):
        spent += flops[names[place]]
        if chosen and spent > MOST_FLOPS:
            break
        chosen.add(names[place])
    return [name for name in names if name in chosen]
