"""HetLoRA: clients of different ranks, zero-padded and weighted with the size of their updates.

Y. J. Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv 2401.06432.

* Client k of rank r_k gets the first r_k rows of A and columns of B ("distribution with truncation").
* It may prune itself while it trains: with q = gamma r_k it adds lambda |B_k[:, q:]| |A_k[q:]| to its loss, and has
  rank q from then on if that product is smaller after training than before. `HetLora.client_settings` asks for it, and
  `fedpeft.adapters.pruning` is the client's side.
* The server pads every A_k and B_k with zeros to the largest rank and averages the factors ("sparsity-weighted"):

      Abar = sum_k w_k A_k,    Bbar = sum_k w_k B_k,    w_k = |s_k B_k A_k| / sum_j |s_j B_j A_j|.

The weights are taken for each layer. Where no client has moved the layer they are the clients' shares of rows, as they
are for the head. Clients train their own r_k ranks alone, so that padding never receives a gradient. A client has its
own s_k: it is sent s / s_k B, and its B_k counts as s_k / s B_k, s being that of the largest rank.

Pruning is off unless ``strategy.prune`` sets gamma: an adapter that shrinks is a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from fedpeft.adapters.pruning import PRUNED_RANK, TAIL_PENALTY
from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.errors import ConfigError
from fedpeft.strategies.algebra.factors import client_weights, norm, whole_cohort
from fedpeft.strategies.algebra.means import mean_dense
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import Capabilities


def sparsity_weights(factors: Sequence[LoraFactors], weights: Sequence[float]) -> list[float]:
    """Return w_k, the share of client k's |s_k B_k A_k| in their sum; `weights` where that sum is zero."""
    sizes = [f.scaling * norm(f.B, f.A) for f in factors]
    total = sum(sizes)
    return [size / total for size in sizes] if total > 0 else list(weights)


def padded_mean(factors: Sequence[LoraFactors], weights: Sequence[float], current: LoraFactors) -> LoraFactors:
    """Average the factors of one layer, each filled up with zeros to the rank of `current`.

    Parameters
    ----------
    factors : sequence of LoraFactors
        A_k ``(r_k, d_in)``, B_k ``(d_out, r_k)``, r_k at most r.
    weights : sequence of float
        w_k.
    current : LoraFactors
        Of rank r; gives scaling and types of the result.
    """
    A = torch.zeros(current.A.shape, dtype=torch.float64)  # (r, d_in)
    B = torch.zeros(current.B.shape, dtype=torch.float64)  # (d_out, r)
    for f, w in zip(factors, weights, strict=True):
        A[: f.rank] += w * f.A.double()
        B[:, : f.rank] += w * f.scaling / current.scaling * f.B.double()
    return LoraFactors(A.to(current.A), B.to(current.B), current.scaling)


class HetLoraOptions(StrategyOptions):
    """Options of HetLoRA."""

    prune: float | None = Field(
        None, gt=0, lt=1, description="gamma, the share of its ranks that a client would keep; no pruning if unset"
    )
    penalty: float = Field(1e-3, gt=0, description="lambda, with prune: weight of the last ranks' size in the loss")


class HetLora(AdapterStrategy):
    """Zero-padded means of mixed ranks, with rank self-pruning (arXiv 2401.06432)."""

    name = "hetlora"
    capabilities = Capabilities(
        paper="arXiv 2401.06432",
        sends="the first r_k ranks of Abar, Bbar",
        exact="for one client: means of zero-padded factors",
        needs_single_factors=True,
        mixed_ranks=True,
        fixed_factors=False,
    )
    Options = HetLoraOptions
    options: HetLoraOptions

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if not self.terms.ranks and self.options.prune is not None:
            raise ConfigError(
                "strategy.prune needs to know the clients' ranks; give ranks, one number if all are equal"
            )

    def accepted_ranks(self, rank: int) -> tuple[int, ...]:
        """Let a client answer with what it was sent, or pruned."""
        return (rank,) if (pruned := self.pruned(rank)) is None else (rank, pruned)

    def pruned(self, rank: int) -> int | None:
        """Return q = floor(gamma r), or None where nothing is pruned."""
        if self.options.prune is None:
            return None
        kept = max(1, int(self.options.prune * rank))
        return kept if kept < rank else None

    def client_settings(self, rank: int) -> dict[str, float]:
        """Tell a client which ranks to press together."""
        kept = self.pruned(rank)
        return {} if kept is None else {PRUNED_RANK: kept, TAIL_PENALTY: self.options.penalty}

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average every layer's padded factors; see `sparsity_weights` and `padded_mean`."""
        cohort = whole_cohort(updates, current)
        rows = client_weights(cohort)
        merged = {}
        for layer, f in current.factors.items():
            factors = [update.factors[layer] for update in cohort]
            mean = padded_mean(factors, sparsity_weights(factors, rows), f)
            merged[layer] = mean if self.trains_a else replace(mean, A=f.A)
        return AdapterState(merged, mean_dense(cohort, current))
