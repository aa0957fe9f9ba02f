"""FedEx-LoRA: means of the factors, and what they miss of the mean of products folded into the base.

R. Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
arXiv 2410.09432. With Abar = sum_k p_k A_k and Bbar = sum_k p_k B_k, clients go on with (Abar, Bbar) and

    W <- W + DW - s Bbar Abar,    DW = s sum_k p_k B_k A_k,

so that the round is exact. The residual is a covariance (derived): sum_k p_k (B_k - Bbar)(A_k - Abar). Because the
p_k (B_k - Bbar) add up to zero, one client can be left out of the sum,

    DW - s Bbar Abar = s sum_{k < K} p_k (B_k - Bbar)(A_k - A_K),

which shows its rank, (K - 1) r, and gives it as factors, without the difference of two nearly equal products.

What differs from the paper's code: B and A are multiplied as Linear layers hold them; a residual that is transposed, as
GPT-2's Conv1D wants it, is wrong for Linear. Clients on another scale s_k enter with B_k s_k / s. Where A is frozen and
shared (ffa-lora) there is no residual.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.strategies.algebra.base_changes import Piece, advance, as_step, step_floats
from fedpeft.strategies.algebra.factors import client_weights
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.capabilities import Capabilities, Merging


def residual(factors: Sequence[LoraFactors], weights: Sequence[float], mean: LoraFactors) -> Piece | None:
    """Return DW - s Bbar Abar of one layer.

    Parameters
    ----------
    factors : sequence of LoraFactors
        The clients'; A_k ``(r, d_in)``, B_k ``(d_out, r)``.
    weights : sequence of float
        p_k, which add up to 1.
    mean : LoraFactors
        (Abar, Bbar); gives type and s of the result.

    Returns
    -------
    LoraFactors or Tensor or None
        (K - 1) r ranks of scaling 1, or a matrix if that is smaller; None of a single client.
    """
    if len(factors) == 1:
        return None
    *others, last = factors
    scaled = [f.scaling / mean.scaling * f.B.double() for f in factors]
    B_mean = sum((p * B for p, B in zip(weights, scaled, strict=True)), torch.zeros_like(scaled[0]))
    B = torch.cat([mean.scaling * p * (B - B_mean) for p, B in zip(weights, scaled[:-1], strict=False)], dim=1)
    A = torch.cat([f.A.double() - last.A.double() for f in others])
    return as_step(B, A, like=mean.B)


class FedExLora(AdapterStrategy):
    """Weighted means, and their error folded into the base (arXiv 2410.09432)."""

    name = "fedex-lora"
    capabilities = Capabilities(
        paper="arXiv 2410.09432",
        sends="Abar, Bbar, and factors of DW - s Bbar Abar, to be added to the base",
        exact="always",
        needs_single_factors=True,
        changes_base=True,
        merging=Merging(any_rank=True),
    )

    @classmethod
    def step_size(cls, d_in: int, d_out: int, ranks: Sequence[int]) -> int:
        """Return (K - 1) r (d_in + d_out), or the size of the layer."""
        return step_floats(sum(ranks[1:]), d_in, d_out)

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average, and fold the residual of every layer into the base; see `residual`."""
        if not self.trains_a:
            return weighted_mean(updates, current, trains_a=False)
        cohort = list(updates)
        mean = weighted_mean(cohort, current)
        weights = client_weights(cohort)
        steps = {
            layer: residual([update.factors[layer] for update in cohort], weights, f)
            for layer, f in mean.factors.items()
        }
        return AdapterState(mean.factors, mean.dense, advance(current.base, steps))
