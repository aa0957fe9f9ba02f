"""What all methods share: their options, their capability record, and the one Flower strategy they extend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.config import Section
from fedpeft.state import AdapterState, ClientUpdate


class StrategyOptions(Section):
    """The options of one method, under ``[strategy]`` in a configuration; closed to unknown keys."""


@dataclass(frozen=True)
class Capabilities:
    """What a method does, from which tables, refusals and byte counts derive.

    Parameters
    ----------
    paper : str
        arXiv number or venue.
    sends : str
        What the server sends down, in the paper's symbols.
    exact : str
        When the sent product equals the weighted mean of the clients' products.
    needs_single_factors : bool
        Whether the server must see single clients' factors; if not, sums suffice.
    """

    paper: str
    sends: str
    exact: str
    needs_single_factors: bool


class AdapterStrategy:
    """Base of all methods."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions

    options: StrategyOptions
    seed: int
    trains_a: bool

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState) -> AdapterState:
        """Merge the cohort's updates, in order, into the adapter that the next round starts from."""
        raise TypeError(f"{type(self).__name__} must define aggregate")
