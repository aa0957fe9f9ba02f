"""FLoRA: all clients' factors stacked, which is the sum of products exactly, folded into the base.

Z. Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv 2409.05976. With

    B* = [p_1 s_1 B_1 .. p_K s_K B_K],    A* = [A_1; ..; A_K],    B* A* = sum_k p_k s_k B_k A_k = DW,

every client adds the product of the stacks to its frozen base, W <- W + B* A*, and begins the next round with a new
random A and B = 0. No noise comes from multiplying means, and clients may have any ranks.

What differs from the paper's code:

* alpha / r goes into the fold: s_k is part of B*, each client's own.
* The new A follows from the run's seed, so that it need not travel.
* A stack of K clients that is no smaller than the layer travels as the matrix DW.
* Clients keep the base as the run began, and are sent how far it has moved: see `.algebra.base_changes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fedpeft.adapters.draws import draw_a
from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors, Role
from fedpeft.strategies.algebra.base_changes import advance, as_step, step_floats
from fedpeft.strategies.algebra.factors import client_weights, stack, whole_cohort
from fedpeft.strategies.algebra.means import mean_dense
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.capabilities import Capabilities, Merging
from fedpeft.strategies.rounds.exchange import Exchange


class FLora(AdapterStrategy):
    """Stacking, folded into the base (arXiv 2409.05976)."""

    name = "flora"
    capabilities = Capabilities(
        paper="arXiv 2409.05976",
        sends="[p_k s_k B_k ..], [A_k; ..], to be added to the base",
        exact="always, for any ranks",
        needs_single_factors=True,
        mixed_ranks=True,
        changes_base=True,
        init="default",
        fixed_factors=False,
        merging=Merging(any_rank=True),
    )

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Let clients draw A anew and set B to zero; the last round's update is in the base."""
        if server_round == 1:
            return Exchange()
        return Exchange(drawn=frozenset({Role.A, Role.B}), draw=server_round)

    @classmethod
    def step_size(cls, d_in: int, d_out: int, ranks: Sequence[int]) -> int:
        """Return sum_k r_k (d_in + d_out), or the size of the layer."""
        return step_floats(sum(ranks), d_in, d_out)

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Fold the stack of every layer into the base, and begin again."""
        cohort = whole_cohort(updates, current)
        weights = client_weights(cohort)
        steps = {}
        factors = {}
        for layer, f in current.factors.items():
            B, A = stack([update.factors[layer] for update in cohort], weights)
            steps[layer] = as_step(B, A, like=f.B)
            A_new = draw_a(self.seed, server_round + 1, layer, *f.A.shape).to(f.A)
            factors[layer] = LoraFactors(A_new, torch.zeros_like(f.B), f.scaling)
        return AdapterState(factors, mean_dense(cohort, current), advance(current.base, steps))
