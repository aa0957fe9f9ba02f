"""Local training: no federation at all, the lower bound that every method is measured against.

Every client trains the adapter and the head on its own rows, goes on in the next round from where it was, and sends
nothing. There is one model a client: a run's score is the mean over them, each on all test rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.capabilities import Capabilities, Merging
from fedpeft.strategies.rounds.exchange import EVERYTHING, Exchange


class Local(AdapterStrategy):
    """Every client for itself."""

    name = "local"
    capabilities = Capabilities(
        paper="baseline",
        sends="nothing",
        exact="does not apply: there is no global update",
        needs_single_factors=False,
        personal=EVERYTHING,
        updates=None,
        head="local",
        merging=Merging(refused="merges nothing"),
        bound="the lower bound: every client trains alone and sends nothing; its score is the mean over the clients' "
        "own models.",
    )

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Train everything, and leave it where it is."""
        return Exchange(personal=EVERYTHING)

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Hear who trained, and merge nothing."""
        deque(updates, maxlen=0)  # they are counted as they are read
        return current
