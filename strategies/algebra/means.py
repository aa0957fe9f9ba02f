"""Weighted means over clients: of factors on one scale, and of everything else that is trained.

The sum is taken in float64 as updates arrive, so that memory does not grow with the cohort.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX, R_SUFFIX, AdapterState, ClientUpdate, LoraFactors
from fedpeft.errors import AdapterError
from fedpeft.strategies.algebra.factors import no_rows, require_layers


class RunningMean:
    """The weighted mean of named tensors, fed one client at a time; float64, the size of one client's tensors."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0
        self._clients = 0

    def add(self, tensors: Mapping[str, Tensor], weight: float, client_id: str) -> None:
        """Fold in one client's tensors.

        Raises
        ------
        AdapterError
            Names or shapes that differ from the first client's: means need equal ranks.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if self._clients == 0:
            self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        for name in sorted(shapes.keys() | self._sums.keys()):
            expected = tuple(self._sums[name].shape) if name in self._sums else None
            if shapes.get(name) != expected:
                raise AdapterError(
                    f"client '{client_id}' sent {name} with shape {shapes.get(name)} where others sent {expected}; "
                    "a mean of factors needs equal ranks, so use a method for mixed ranks (`fedpeft strategies`)"
                )
        for name, tensor in tensors.items():
            self._sums[name].add_(tensor.to("cpu"), alpha=weight)  # promoted to float64 before the product
        self._weight += weight
        self._clients += 1

    def mean(self) -> dict[str, Tensor]:
        """Return the mean so far, in float64.

        Raises
        ------
        TooFewClientsError
            The weights sum to zero.
        """
        if self._weight <= 0:
            raise no_rows(self._clients)
        return {name: total / self._weight for name, total in self._sums.items()}


def mean_dense(updates: Iterable[ClientUpdate], current: AdapterState) -> dict[str, Tensor]:
    """Return the weighted mean of the other trained tensors, such as a classifier head, by name.

    Tensors of `current` that no client sends are not trained: they stay.
    """
    running = RunningMean()
    for update in updates:
        running.add(update.dense, update.num_examples, update.client_id)
    return _dense_like(running.mean(), current)


def weighted_mean(
    updates: Iterable[ClientUpdate], current: AdapterState, trains_a: bool = True, trains_b: bool = True
) -> AdapterState:
    """Average A, B and the other trained tensors over clients, each weighted with its number of rows.

    Where there is an R between them (LoRA-XS, LoRA-SB), it is averaged alone: A and B are fixed.

    Parameters
    ----------
    updates : iterable of ClientUpdate
        The cohort; consumed once, one update held at a time.
    current : AdapterState
        The adapter that the clients started from. The result has its scalings and types.
    trains_a, trains_b : bool
        False where a factor is shared and not trained: the result then has that of `current`, bit by bit.

    Returns
    -------
    AdapterState
        (Abar, Bbar) of every layer, and the mean of each dense tensor.

    Raises
    ------
    AdapterError
        Clients whose layers, names or shapes differ.
    TooFewClientsError
        No client trained on any row.
    """
    factors, dense = RunningMean(), RunningMean()
    for update in updates:
        factors.add(trained_tensors(update, current, trains_a, trains_b), update.num_examples, update.client_id)
        dense.add(update.dense, update.num_examples, update.client_id)
        del update  # else it lives on while the next one is read
    means = factors.mean()
    merged = {
        layer: LoraFactors(
            _like(f.A, means.get(layer + A_SUFFIX)),  # (r, d_in)
            _like(f.B, means.get(layer + B_SUFFIX)),  # (d_out, r)
            f.scaling,
            None if f.R is None else _like(f.R, means.get(layer + R_SUFFIX)),  # (r, r)
        )
        for layer, f in current.factors.items()
    }
    return AdapterState(merged, _dense_like(dense.mean(), current))


def trained_tensors(update: ClientUpdate, current: AdapterState, trains_a: bool, trains_b: bool) -> dict[str, Tensor]:
    """Return A_k and B_k s_k / s, or R_k s_k / s, of all layers by PEFT's names; without factors that nobody trains."""
    require_layers(update, current)
    tensors: dict[str, Tensor] = {}
    for layer, f in update.factors.items():
        ratio = f.scaling / current.factors[layer].scaling
        if f.R is not None:
            tensors[layer + R_SUFFIX] = f.R if ratio == 1 else f.R.to(torch.float64) * ratio
            continue
        if trains_a:
            tensors[layer + A_SUFFIX] = f.A
        if trains_b:
            tensors[layer + B_SUFFIX] = f.B if ratio == 1 else f.B.to(torch.float64) * ratio
    return tensors


def _like(before: Tensor, mean: Tensor | None) -> Tensor:
    """Return the mean in the type of what it replaces, which stays where nobody trains it."""
    return before if mean is None else mean.to(before)


def _dense_like(means: Mapping[str, Tensor], current: AdapterState) -> dict[str, Tensor]:
    return {name: means[name].to(tensor) if name in means else tensor for name, tensor in current.dense.items()}
