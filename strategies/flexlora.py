"""FlexLoRA: the best approximation, at the adapter's rank, of the mean of products.

J. Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv 2402.11505. With DW = sum_k p_k s_k B_k A_k and its singular value decomposition

    DW = U diag(S) V^T,    S_1 >= S_2 >= ...,

the server keeps the first r singular directions, which no other product of rank r brings nearer to DW. A client of rank
r_k takes the first r_k of them, its own best approximation: so the largest come first. Ranks and scalings may differ
between clients. It is exact where r is no less than the rank of DW, at most R = sum_k r_k.

What differs from the paper:

* DW is never formed, and ``solver = "randomized"`` finds its range by random products where R is large: see
  `.algebra.spectra`.
* Any split of S between B and A is the same product. Here it is balanced, B = U sqrt(S) / s and A = sqrt(S) V^T, the s
  that clients multiply with being on B alone. The largest entry of each left vector is positive: equal inputs give
  equal bytes.
* Where DW has fewer than r directions, the other ranks get b = 0 and a row of A that the clients had: with both zero
  neither would ever get a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.seeds import generator
from fedpeft.strategies.algebra.factors import client_weights, whole_cohort
from fedpeft.strategies.algebra.means import mean_dense, weighted_mean
from fedpeft.strategies.algebra.spectra import best_rank
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import FROZEN_A_KINDS, Capabilities, Merging

Solver = Literal["exact", "randomized"]


class FlexLoraOptions(StrategyOptions):
    """Options of FlexLoRA."""

    solver: Solver = Field("exact", description="exact, or randomized: cheaper where many clients send many ranks")
    oversampling: int = Field(8, ge=0, description="randomized: random vectors beyond the rank")
    power_iterations: int = Field(2, ge=0, description="randomized: multiplications that sharpen slow spectra")


class FlexLora(AdapterStrategy):
    """Truncated singular value decomposition of the mean of products (arXiv 2402.11505)."""

    name = "flexlora"
    capabilities = Capabilities(
        paper="arXiv 2402.11505",
        sends="U sqrt(S), sqrt(S) V^T of the r largest singular values of DW",
        exact=f"at r >= the rank of DW, and where A is frozen ({FROZEN_A_KINDS}); else the nearest product of rank r",
        needs_single_factors=True,
        mixed_ranks=True,
        merging=Merging(any_rank=True),
    )
    Options = FlexLoraOptions
    options: FlexLoraOptions

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Decompose every layer's DW and keep its ranks; see `best_rank`."""
        if not self.trains_a:  # rank r already, and A stays
            return weighted_mean(updates, current, trains_a=False)
        cohort = whole_cohort(updates, current)
        weights = client_weights(cohort)
        options = self.options
        merged = {}
        for layer, f in current.factors.items():
            merged[layer] = best_rank(
                [update.factors[layer] for update in cohort],
                weights,
                f.rank,
                f,
                generator(self.seed, "flexlora", layer) if options.solver == "randomized" else None,
                options.oversampling,
                options.power_iterations,
            )
        return AdapterState(merged, mean_dense(cohort, current))
