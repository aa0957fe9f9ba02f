"""raFLoRA: FlexLoRA whose clients share the weight of each rank only with those who have it.

F. Wu, J. Hu, G. Min, S. Wang, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
arXiv 2602.13486. Where ranks differ, FlexLoRA weighs client k's product with p_k = n_k / sum n in all of its ranks,
though a client of rank 2 says nothing about the third: what only large clients learn is multiplied by their share of
the rows, and again in the next round, until the energy is in the ranks that all have. So the ranks are partitioned at
the clients' ranks, and each slice (l, h] is averaged over those who have it:

    DW' = sum over (l, h] of  sum_{r_k >= h} n_k / N_h s_k B_k[:, l:h] A_k[l:h],    N_h = sum_{r_k >= h} n_k,

then decomposed, cut to the adapter's rank, and each client is sent its first r_k singular directions, as by FlexLoRA.
Where all ranks are equal it is FlexLoRA. Where they are not, DW' is not DW: it is larger, on purpose, and so the
aggregation error shows how far it goes. Slices mean the same to all clients only because these begin each round at the
leading directions of one decomposition; a client that pruned or permuted its ranks would break that.

The partition, its weights and the decomposition are Algorithm 1 as somebody else's port quotes it; the paper's own text
was not to be had, so these are this project's:

* s_k = alpha / r_k goes into the products, each client's own.
* A slice that no client of the round has stays as it was, as nobody trained it; else a round without the largest
  clients would forget what they learned.
* Where A is frozen and shared (ffa-lora), ranks are equal, and the weighted mean of B is sent.
* The decomposition, its signs, the balanced split and how missing directions are filled up are FlexLoRA's here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.strategies.algebra.factors import client_weights, whole_cohort
from fedpeft.strategies.algebra.means import mean_dense, weighted_mean
from fedpeft.strategies.algebra.spectra import best_rank
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.capabilities import Capabilities, Merging


def rank_weights(ranks: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Return each client's weight in each rank, ``(K, r)``; r is the largest of the ranks.

    Parameters
    ----------
    ranks, weights : sequence
        r_k and p_k.

    Returns
    -------
    Tensor
        Float64. A column sums to 1; a client has no weight in ranks that it lacks.
    """
    holds = torch.tensor(ranks)[:, None] > torch.arange(max(ranks))  # (K, r)
    share = holds * torch.tensor(weights, dtype=torch.float64)[:, None]
    total = share.sum(dim=0)
    return share / torch.where(total > 0, total, 1.0)


def partitioned(
    factors: Sequence[LoraFactors], weights: Sequence[float], current: LoraFactors
) -> tuple[list[LoraFactors], list[float]]:
    """Return products and weights whose weighted sum is DW' of one layer.

    Parameters
    ----------
    factors, weights : sequence
        The clients', of any ranks, and their p_k.
    current : LoraFactors
        What the round began with; ranks that no client of weight has are taken from it.
    """
    shares = rank_weights([f.rank for f in factors], weights)
    products = [replace(f, B=f.B * share[: f.rank].to(f.B)) for f, share in zip(factors, shares, strict=True)]
    trained = max((f.rank for f, p in zip(factors, weights, strict=True) if p > 0), default=0)
    if trained < current.rank:
        products.append(replace(current, A=current.A[trained:], B=current.B[:, trained:]))
    return products, [1.0] * len(products)


class RaFLora(AdapterStrategy):
    """Truncated decomposition of means by partitions of ranks (arXiv 2602.13486)."""

    name = "raflora"
    capabilities = Capabilities(
        paper="arXiv 2602.13486",
        sends="U sqrt(S), sqrt(S) V^T of the r largest singular directions of the mean by partitions of ranks",
        exact="where all ranks are equal, at r >= the rank of DW; else it makes up for those who lack a rank",
        needs_single_factors=True,
        mixed_ranks=True,
        merging=Merging(
            refused="averages ranks of equal index, which mean the same only to clients that began at one adapter"
        ),
    )

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average every layer by partitions, and keep its ranks; see `partitioned`."""
        if not self.trains_a:
            return weighted_mean(updates, current, trains_a=False)
        cohort = whole_cohort(updates, current)
        weights = client_weights(cohort)
        merged = {}
        for layer, f in current.factors.items():
            products, ones = partitioned([update.factors[layer] for update in cohort], weights, f)
            merged[layer] = best_rank(products, ones, f.rank, f)
        return AdapterState(merged, mean_dense(cohort, current))
