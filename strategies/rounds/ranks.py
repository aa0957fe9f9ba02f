"""Clients of different ranks: which has which, and what each is sent of an adapter of the largest rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.strategies.rounds.report import client_order


def cut(state: AdapterState, rank: int, scaling: float) -> AdapterState:
    """Return the first `rank` ranks of every layer, all if it has fewer, for clients who multiply with another scaling.

    The product of these ranks is the same: s B A = s_k (s / s_k B) A.
    """
    return replace(state, factors={layer: _cut(f, rank, scaling) for layer, f in state.factors.items()})


def _cut(f: LoraFactors, rank: int, scaling: float) -> LoraFactors:
    ratio = f.scaling / scaling
    B = f.B[:, :rank]
    return replace(f, A=f.A[:rank].contiguous(), B=(B if ratio == 1 else B * ratio).contiguous(), scaling=scaling)


class Ranks:
    """The rank of each client.

    Ranks are dealt in turn over the clients in the order of their ids; those who join later continue the deal. A client
    keeps its rank, whoever else is there.

    Parameters
    ----------
    ranks : sequence of int
        Such as (4, 8, 16): the first client has rank 4, the fourth 4 again.
    scaling_of : callable
        Gives the scaling of a client of some rank.
    """

    def __init__(self, ranks: Sequence[int], scaling_of: Callable[[int], float]) -> None:
        self.dealt = tuple(ranks)
        self.scaling_of = scaling_of
        self.of: dict[str, int] = {}

    def deal(self, clients: Iterable[str]) -> None:
        """Give a rank to each client that has none."""
        for client in sorted(set(clients) - self.of.keys(), key=client_order):
            self.of[client] = self.dealt[len(self.of) % len(self.dealt)]
