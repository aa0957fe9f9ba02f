"""Fed-SB: the weighted mean of R, a square matrix between factors that everybody holds.

R. Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning", arXiv 2502.15436. A layer's update is s B R A, where B and A are fixed, so that it is linear in R:

    Rbar = sum_k p_k R_k,    s B Rbar A = sum_k p_k s B R_k A,

exactly. A client sends r^2 numbers a layer, however wide the layer is.

B and A are those of the adapter's kind, see `fedpeft.adapters.kinds.square`. As the paper has it, they come from a
gradient: ``adapter.kind=lora-sb``, which looks at rows that must be public (``adapter.init_data``). Without such rows
they are singular vectors of the base's weights, ``adapter.kind=lora-xs``: then this is LoRA-XS (arXiv 2405.17604) in a
federation, and what a run does that names no kind.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedpeft.adapters.state import AdapterState, ClientUpdate, Role
from fedpeft.strategies.averaged import AveragingStrategy
from fedpeft.strategies.capabilities import Capabilities, Merging
from fedpeft.strategies.rounds.exchange import Exchange


class FedSb(AveragingStrategy):
    """The weighted mean of R (arXiv 2502.15436)."""

    name = "fed-sb"
    capabilities = Capabilities(
        paper="arXiv 2502.15436",
        sends="Rbar",
        exact="always: A and B are shared",
        needs_single_factors=False,
        trains="R",
        updates=frozenset({"square"}),
        kind="lora-xs",
        merging=Merging(refused="sums the R of adapters that share A and B, and these have no R"),
    )

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Train R."""
        return Exchange(trained=frozenset({Role.R, Role.HEAD}))

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average R as it arrives; see `average`."""
        return self.average(updates, current)
