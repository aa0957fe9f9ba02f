"""FRLoRA: each round's mean update moves the base, and clients begin again at the principal part of the weights.

Y. Yan et al., "Federated Residual Low-Rank Adaptation of Large Language Models", ICLR 2025. Let s B0 A0 be the best
approximation of rank r of a layer's original weight W0. The layer is W0 - s B0 A0, frozen, and the adapter, which
begins at (A0, B0). After a round

    W <- W + s (Bbar Abar - B0 A0),

and the adapter is (A0, B0) again: what was learned is in the base, of any rank after enough rounds, and each round
begins in the directions that matter most to the layer. The mean of products is not met: Bbar Abar is one of means.

The adapter begins as ``adapter.init = "pissa"`` sets it, which this method implies. The server needs sums of factors
only. Clients are sent how far the base has moved (see `.algebra.base_changes`), and draw (A0, B0) themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors, Role
from fedpeft.strategies.algebra.base_changes import Piece, advance, as_step, step_floats
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.capabilities import Capabilities, Merging
from fedpeft.strategies.rounds.exchange import Exchange


def residual(mean: LoraFactors, start: LoraFactors) -> Piece | None:
    """Return s (Bbar Abar - B0 A0) of one layer, of rank 2 r, or as a matrix if that is smaller."""
    s = start.scaling
    B = torch.cat([s * mean.B.double(), -s * start.B.double()], dim=1)
    return as_step(B, torch.cat([mean.A.double(), start.A.double()]), like=start.B)


class FrLora(AdapterStrategy):
    """Residual accumulation from the weights' principal part (ICLR 2025)."""

    name = "frlora"
    capabilities = Capabilities(
        paper="ICLR 2025",
        sends="factors of s (Bbar Abar - B0 A0), to be added to the base",
        exact="for one client: Bbar Abar is a product of means",
        needs_single_factors=False,
        changes_base=True,
        init="pissa",
        fixed_factors=False,
        merging=Merging(
            refused="begins at the principal part of the base's weights, which adapters on disk do not hold"
        ),
    )

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Let clients begin every round at (A0, B0), which they hold."""
        return Exchange() if server_round == 1 else Exchange(drawn=frozenset({Role.A, Role.B}))

    @classmethod
    def step_size(cls, d_in: int, d_out: int, ranks: Sequence[int]) -> int:
        """Return 2 r (d_in + d_out), or the size of the layer."""
        return step_floats(2 * max(ranks), d_in, d_out)

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Fold the mean's change of every layer into the base, and begin again where the round began."""
        mean = weighted_mean(updates, current)
        steps = {layer: residual(mean.factors[layer], f) for layer, f in current.factors.items()}
        return AdapterState(current.factors, mean.dense, advance(current.base, steps))
