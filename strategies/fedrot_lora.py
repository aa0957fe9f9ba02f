"""FedRot-LoRA: the means of FedIT, of factors that were first rotated towards each other.

H. Zhang, D. Kim, S. Cha, H. Vikalo, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA",
arXiv 2602.23638. For an orthogonal R, (B_k R)(R^T A_k) = B_k A_k: clients that agree on a product may disagree on its
factors, and means of factors then cancel. So each client k is rotated towards the factors that the round started from,

    R_k = argmin |R^T A_k - A|^2    in even rounds,    argmin |B_k R - B|^2    in odd rounds,    over orthogonal R,

which is the orthogonal factor U V^T of A_k A^T = U S V^T, or of B_k^T B; and the server sends the means of R_k^T A_k
and B_k R_k. Rounds count from 1. In round 1 nothing is rotated: B is still zero, and all A_k just left one A. Then A is
aligned first, in round 2, and B in round 3: the order, and the whole rotation, are what the authors' code does by
default and in its experiments (https://github.com/haoran-zh/FedRot-LoRA, whose round 0 is round 1 here).

The rotation can be softened, an option that the authors study too: R_k is replaced by the orthogonal matrix nearest to
(1 - lambda) I + lambda R_k. lambda = 1 (default) is R_k in full, 0 is FedIT. Below 1, R_k is drawn from rotations,
det R = 1, since there is no way from I to a reflection; at 1 reflections count too, so that clients that differ by any
orthogonal matrix are merged exactly.

What differs from the authors' code:

* Directions that A_k A^T does not determine, all of them where B is zero, turn as little as possible. There they turn
  as the SVD happens to. The same holds at lambda = 1/2 of half a turn, which has no middle.
* The server rotates, in float64; there each client does, before it sends.
* B_k is put on the scale of the adapter, as in FedIT. Scales do not change R_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.errors import AdapterError
from fedpeft.strategies.algebra.factors import require_layers
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import FROZEN_A_KINDS, Capabilities, Merging

Aligned = Literal["A", "B"]

# Singular values of A_k A^T below this share of |A_k| |A| are what cancelled.
UNDETERMINED = 1e-9


def aligned_factor(server_round: int) -> Aligned | None:
    """Return which factor a round's rotations align: none in round 1, then A in even rounds and B in odd ones."""
    if server_round <= 1:
        return None
    return "B" if server_round % 2 else "A"


def nearest_orthogonal(M: Tensor, proper: bool, size: float = 0.0) -> Tensor:
    """Return the orthogonal matrix nearest to M ``(r, r)``; of several, one as near to the identity as possible.

    Parameters
    ----------
    M : Tensor
        Any square matrix, float64.
    proper : bool
        Whether reflections, whose determinant is -1, are out of the question.
    size : float
        Of what M is a product of: singular values of less than a small share of it are what cancelled, and say nothing.
    """
    U, S, Vt = torch.linalg.svd(M)
    q = int(torch.gt(S, max(UNDETERMINED * size, float(S.max()) * len(S) * torch.finfo(torch.float64).eps)).sum())
    if q < len(S):  # M does not say how its null spaces go together: turn them by as little as possible
        left, _, right = torch.linalg.svd(U[:, q:].T @ Vt[q:].T)
        U = torch.cat([U[:, :q], U[:, q:] @ left], dim=1)
        Vt = torch.cat([Vt[:q], right @ Vt[q:]])
    nearest: Tensor = U @ Vt
    if proper and torch.linalg.det(nearest) < 0:
        nearest = nearest - 2 * torch.outer(U[:, -1], Vt[-1])  # the direction that costs least
    return nearest


def rotation(f: LoraFactors, reference: LoraFactors, aligned: Aligned, rotate_lambda: float) -> Tensor:
    """Return R of one client and layer.

    Parameters
    ----------
    f : LoraFactors
        The client's factors A_k ``(r, d_in)`` and B_k ``(d_out, r)``.
    reference : LoraFactors
        What the round started from, of the same rank.
    aligned : {"A", "B"}
        Which factor comes nearest to the reference's.
    rotate_lambda : float
        lambda in [0, 1]: 1 is R_k in full, 0 the identity.

    Returns
    -------
    Tensor
        R ``(r, r)``, orthogonal, float64.
    """
    if aligned == "A":
        factor, target = f.A.to(torch.float64), reference.A.to(torch.float64)  # (r, d)
    else:
        factor, target = f.B.to(torch.float64).T, reference.B.to(torch.float64).T
    full = nearest_orthogonal(factor @ target.T, rotate_lambda < 1, float(factor.norm() * target.norm()))
    if rotate_lambda == 1:
        return full
    identity = torch.eye(f.rank, dtype=torch.float64)
    return nearest_orthogonal((1 - rotate_lambda) * identity + rotate_lambda * full, proper=True)


def rotate(f: LoraFactors, R: Tensor) -> LoraFactors:
    """Return (R^T A, B R) in float64: the same adapter, since R ``(r, r)`` is orthogonal."""
    return LoraFactors(R.T @ f.A.to(torch.float64), f.B.to(torch.float64) @ R, f.scaling)


def align(update: ClientUpdate, current: AdapterState, aligned: Aligned, rotate_lambda: float) -> ClientUpdate:
    """Return a client's update with every layer rotated towards the adapter that it started from.

    Raises
    ------
    AdapterError
        Layers or ranks that are not the adapter's.
    """
    require_layers(update, current)
    rotated = {}
    for layer, f in update.factors.items():
        reference = current.factors[layer]
        if f.rank != reference.rank:
            raise AdapterError(
                f"client '{update.client_id}' sent rank {f.rank} for {layer} where the adapter has rank "
                f"{reference.rank}; rotations need equal ranks, so use a method for mixed ranks (`fedpeft strategies`)"
            )
        rotated[layer] = rotate(f, rotation(f, reference, aligned, rotate_lambda))
    return replace(update, factors=rotated)


class FedRotLoraOptions(StrategyOptions):
    """Options of FedRot-LoRA."""

    rotate_lambda: float = Field(
        1.0, ge=0, le=1, description="lambda, how far clients are rotated: 1 in full, as its authors do; 0 is fedit"
    )


class FedRotLora(AdapterStrategy):
    """Weighted means of rotated factors (arXiv 2602.23638)."""

    name = "fedrot-lora"
    capabilities = Capabilities(
        paper="arXiv 2602.23638",
        sends="means of R_k^T A_k and B_k R_k",
        exact=f"only where A is frozen ({FROZEN_A_KINDS}); with lambda = 1, also for clients that differ by rotations",
        needs_single_factors=True,
        merging=Merging(as_round=2),  # an even one, whose rotations align A; the first one rotates nothing
    )
    Options = FedRotLoraOptions
    options: FedRotLoraOptions

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Rotate each client as it arrives, then average; see `align`."""
        aligned = aligned_factor(server_round)
        if aligned is None or not self.trains_a:  # a rotation would change A
            return weighted_mean(updates, current, self.trains_a)
        return weighted_mean(self._aligned(updates, current, aligned), current)

    def _aligned(
        self, updates: Iterable[ClientUpdate], current: AdapterState, aligned: Aligned
    ) -> Iterator[ClientUpdate]:
        for update in updates:
            yield align(update, current, aligned, self.options.rotate_lambda)
