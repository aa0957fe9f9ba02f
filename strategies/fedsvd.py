"""FedSVD: B is trained and averaged, and an SVD of the product gives A its turn.

S. Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv 2505.12805. Clients
share A and train B alone, so that Bbar A is the exact mean of products. Then the server factors it anew,

    Bbar A = U S V^T,    A <- V_r^T,    B <- U_r S_r,

which changes no product. Nor does it change what A can reach (derived): V_r^T spans the rows of Bbar A, which lie in
those of A, and where Bbar has lost rank the other rows are completed within A's too. So the row space of A is that of
the A which the run began with, in every round, as with FFA-LoRA: no direction is ever won. What the SVD buys is
conditioning: the rows of A are orthonormal, so that a step in B, and under differential privacy the noise on it, moves
the product equally in all of them.

The SVD is of the small matrix Bbar R^T, where A^T = QR: then U S W^T = Bbar R^T gives V^T = W^T Q^T, orthonormal even
where the product has lost rank or, in the first round, A is still as drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors, Role
from fedpeft.config import AdapterConfig
from fedpeft.errors import ConfigError
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import Capabilities, Merging
from fedpeft.strategies.rounds.exchange import Exchange


def refactor(f: LoraFactors) -> LoraFactors:
    """Return the same product with orthonormal rows of A, in the order of their singular values.

    Parameters
    ----------
    f : LoraFactors
        A ``(r, d_in)`` and B ``(d_out, r)``, r at most d_in.

    Returns
    -------
    LoraFactors
        V^T ``(r, d_in)`` and U S ``(d_out, r)``, of the same types and scaling.
    """
    Q, R = torch.linalg.qr(f.A.to(torch.float64).T)  # (d_in, r), (r, r)
    core = f.B.to(torch.float64) @ R.T  # (d_out, r)
    # B W = U S needs no U, which is undetermined where a singular value is zero; W is square whatever d_out is
    Wt = torch.linalg.svd(core, full_matrices=core.shape[0] < core.shape[1]).Vh  # (r, r)
    return replace(f, A=(Wt @ Q.T).to(f.A), B=(core @ Wt.T).to(f.B))


class FedSvd(AdapterStrategy):
    """The mean of B, refactored by an SVD with orthonormal A (arXiv 2505.12805)."""

    name = "fedsvd"
    capabilities = Capabilities(
        paper="arXiv 2505.12805",
        sends="A = V^T, B = U S of the SVD of Bbar A",
        exact="always: A is shared",
        needs_single_factors=False,
        trains="B",
        merging=Merging(shares_a="B"),
    )

    @classmethod
    def check(cls, options: StrategyOptions, adapter: AdapterConfig) -> None:
        """Raise ConfigError if A may not change even between rounds."""
        if Role.A in adapter.facts.fixed:
            raise ConfigError(
                f"strategy 'fedsvd' changes A between rounds, which adapter.kind = '{adapter.kind}' forbids; "
                "use adapter.kind = 'lora' (fedsvd's clients train B alone)"
            )

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Train B; A is new in every round."""
        return Exchange(trained=frozenset({Role.B, Role.HEAD}), refactored=frozenset({Role.A}))

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average B as it arrives, then refactor every layer; see `refactor`."""
        mean = weighted_mean(updates, current, trains_a=False)
        return AdapterState({layer: refactor(f) for layer, f in mean.factors.items()}, mean.dense)
