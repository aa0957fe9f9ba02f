"""FedIT: the weighted mean of A and the weighted mean of B.

J. Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644. With
p_k = n_k / sum n,

    Abar = sum_k p_k A_k,    Bbar = sum_k p_k B_k s_k / s,

and the server sends (Abar, Bbar). The product of means is not the mean of products: Bbar Abar differs from
sum_k p_k (s_k / s) B_k A_k by the covariance of B_k and A_k over clients. It is exact for one client, for equal clients
and wherever A is shared and frozen, which is FFA-LoRA (arXiv 2403.12313).

Of every other kind of adapter it averages whatever is trained, name by name. That is exact where the update is linear
in it, as with the R of LoRA-XS and LoRA-SB and in MiSS; in DoRA, AdaLoRA, VeRA, RandLoRA, LoHa and LoKr it is not.

What differs from the paper: clients may have scalings s_k of their own, so each B_k is first put on the scale s of the
adapter that is sent; and the sum is taken as updates arrive (`fedpeft.strategies.algebra.means`).
"""

from __future__ import annotations

from collections.abc import Iterable

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.strategies.averaged import AveragingStrategy
from fedpeft.strategies.capabilities import LINEAR_KINDS, Capabilities


class FedIt(AveragingStrategy):
    """Weighted means of A and of B (arXiv 2305.05644)."""

    name = "fedit"
    capabilities = Capabilities(
        paper="arXiv 2305.05644",
        sends="Abar, Bbar",
        exact=f"only where the update is linear in what is trained ({LINEAR_KINDS})",
        needs_single_factors=False,
        updates=None,
    )

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average the cohort as it arrives; see `average`."""
        return self.average(updates, current, self.trains_a)
