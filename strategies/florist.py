"""FLoRIST: the mean of products at the smallest rank that keeps a given share of its energy.

H. Ramesh, J. Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models", arXiv 2506.09199. With DW = sum_k p_k s_k B_k A_k = U diag(S) V^T, each layer keeps its first

    p = min { k : sum_{i <= k} S_i^2 / sum_i S_i^2 >= tau }

singular directions. What is lost is |DW - sent|^2 <= (1 - tau) |DW|^2 in every layer; tau = 1 is exact. The rank of the
result is not that of the adapter, differs between layers, and may grow up to that of DW, at most R = sum_k r_k.

What differs from the paper:

* The decomposition is FlexLoRA's here, a QR of each stack, not an SVD; so are the balanced split of S, signs and order.
* Its authors fill a client's ranks up again where fewer are kept than it has. ``strategy.padding`` does so: layers that
  keep fewer ranks than the adapter began with get more, with b = 0 and a row of A that the clients had. The product is
  the same, and clients train as many numbers as they did in the first round; without it (the default here) what is cut
  once is not learned again beyond K p ranks, and less is moved. How the authors draw the new rows was not to be had.
* tau = 0.9 is this project's default; the paper tunes tau to the task.
* A layer whose DW is zero keeps one rank, with b = 0 and a row of A that the clients had, so that it can be trained.
* Where clients have different ranks, one of rank r_k is sent the first r_k directions, if more are kept.
* Where A is frozen and shared (ffa-lora) it keeps its rank and tau does nothing: the weighted mean of B is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.config import AdapterConfig
from fedpeft.errors import ConfigError
from fedpeft.strategies.algebra.factors import client_weights, whole_cohort
from fedpeft.strategies.algebra.means import mean_dense, weighted_mean
from fedpeft.strategies.algebra.spectra import decompose, truncate
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import FROZEN_A_KINDS, Capabilities, Merging

BEGUN = "begun."  # of names in a checkpoint


def kept_rank(S: Tensor, threshold: float) -> int:
    """Return the fewest of the largest singular values that hold a share of the energy.

    Parameters
    ----------
    S : Tensor
        Singular values, largest first, ``(q,)``.
    threshold : float
        tau in (0, 1]. 1 keeps all that are not zero.

    Returns
    -------
    int
        p >= 1, even where there is no energy at all.
    """
    if len(S) == 0 or S[0] == 0:
        return 1
    energy = (S.to(torch.float64) / S[0]).square()  # of a tiny S the square would be 0
    # Summed from the small end: beside the large ones, values below 1e-8 would vanish, and tau = 1 would not be exact.
    lost = energy.flip(0).cumsum(0).flip(0)  # (q,) energy of i and all after it, what keeping i alone leaves out
    total = lost[0]
    return max(1, int(torch.gt(lost, total - threshold * total).sum()))


class FloristOptions(StrategyOptions):
    """Options of FLoRIST."""

    threshold: float = Field(0.9, gt=0, le=1, description="tau, share of each layer's squared norm kept; 1 is exact")
    padding: bool = Field(False, description="fill layers up to the ranks that the adapter began with, with b = 0")


class Florist(AdapterStrategy):
    """Singular value thresholding of the mean of products (arXiv 2506.09199)."""

    name = "florist"
    capabilities = Capabilities(
        paper="arXiv 2506.09199",
        sends="U sqrt(S), sqrt(S) V^T of the singular values that hold tau of DW's energy",
        exact=f"at tau = 1, and where A is frozen ({FROZEN_A_KINDS})",
        needs_single_factors=True,
        changes_rank=True,
        mixed_ranks=True,
        merging=Merging(rank_by="threshold=T"),
    )
    Options = FloristOptions
    options: FloristOptions

    @classmethod
    def check(cls, options: FloristOptions, adapter: AdapterConfig) -> None:
        """Raise ConfigError if a threshold would cut what the initialisation took out of the base."""
        if adapter.beginning.of_base and options.threshold < 1:
            raise ConfigError(
                f"strategy.threshold = {options.threshold:g} would cut parts of the weights that adapter.init = "
                f"'{adapter.init}' has moved from the base into the adapter; give strategy.threshold=1, or another init"
            )

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._begun: dict[str, int] = {}  # ranks of the run's adapter by layer, with padding

    def memory(self) -> dict[str, Tensor]:
        """Return the ranks that layers are filled up to."""
        return {f"{BEGUN}{layer}": torch.tensor(rank) for layer, rank in self._begun.items()}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Take up the ranks that layers are filled up to."""
        self._begun = {name.removeprefix(BEGUN): int(rank) for name, rank in memory.items()}

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Decompose every layer's DW and keep as many ranks as it needs; see `kept_rank`."""
        if not self.trains_a:
            return weighted_mean(updates, current, trains_a=False)
        cohort = whole_cohort(updates, current)
        weights = client_weights(cohort)
        merged = {}
        for layer, f in current.factors.items():
            spectrum = decompose([update.factors[layer] for update in cohort], weights)
            kept = kept_rank(spectrum.S, self.options.threshold)
            wanted = kept
            if self.options.padding:
                wanted = max(kept, self._begun.setdefault(layer, f.rank))
            merged[layer] = truncate(spectrum.first(kept), wanted, f)
        return AdapterState(merged, mean_dense(cohort, current))
