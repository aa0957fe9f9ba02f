"""LoRA-FAIR: the means of FedIT, and a correction of B that brings their product nearer to the mean of products.

J. Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
arXiv 2411.14961. With DW = sum_k p_k s_k B_k A_k the ideal update and all B_k on one scale s, the server finds

    min over dB of  S(DW, (Bbar + dB) Abar) + lambda |dB|

in each layer and sends (Abar, Bbar + dB), from which clients start the next round. Two solvers, each with a lambda of
its own:

``closed-form`` (default) is this project's, not the paper's: the nearest product whose rows lie in row(Abar). It takes
the squared distance for S, and squares the penalty; per layer, one r x r system:

    dB = (DW/s - Bbar Abar) Abar^T (Abar Abar^T + mu I)^-1,    mu = lambda tr(Abar Abar^T) / r.

Scaled by the mean eigenvalue, one lambda means the same in every layer. lambda = 0 projects DW on the rows of Abar;
lambda -> infinity is FedIT. In no layer is the product that is sent further from DW than FedIT's. Its lambda was chosen
by measurement, see docs/methods.md.

``cosine`` is the objective of the code that derives from the authors' (that of SpecTraL, ECML 2026): the columns of the
two products are compared each by its own cosine, and the penalty is squared, with lambda = 1,

    min over dB of  mean over j of (1 - cos(DW[:, j], ((Bbar + dB) Abar)[:, j])) + lambda |dB|^2.

* The paper prints one similarity of the whole layer, which would be minimised, and lambda |dB|, with lambda = 0.01.
* That code starts at a random dB (Xavier's) and runs at most 1000 steps of SGD with learning rate 0.01 on all layers at
  once. Here dB starts at zero, each layer is solved for itself, by L-BFGS to convergence, and nothing is drawn: the
  same updates give the same bytes. From a random start the product ends ten times as far from DW as FedIT's.
* A column of DW or of Bbar Abar that is zero has no cosine, and asks for nothing.
* Cosines fix directions, not lengths, so that the product may end further from DW than FedIT's.

Where the clients' A_k cancel in Abar, a B that makes up for it would be huge, and made of what they happen to differ
in. So directions of Abar that are below 0.3 % of the clients' own size there carry nothing: B stays the mean in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.strategies.algebra.factors import client_weights, stack, stacks
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import FROZEN_A_KINDS, Capabilities

Solver = Literal["closed-form", "cosine"]

# lambda where nobody gives one
REGULARIZATION: Mapping[Solver, float] = {"closed-form": 0.01, "cosine": 1.0}
# A direction of Abar of less than this share of the clients' own size in it is what is left of terms that cancelled.
CANCELLED = 3e-3
COSINE_STEPS = 1000
EMPTY = 1e-12  # a column of less than this share of the longest has no direction


def correct(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    mean: LoraFactors,
    regularization: float,
    solver: Solver = "closed-form",
) -> Tensor:
    """Return Bbar + dB of one layer.

    Parameters
    ----------
    factors : sequence of LoraFactors
        The clients' factors; A_k ``(r, d_in)``, B_k ``(d_out, r)``.
    weights : sequence of float
        Their weights p_k.
    mean : LoraFactors
        Abar ``(r, d_in)`` and Bbar ``(d_out, r)`` as they would be sent, B on the scale of ``mean.scaling``.
    regularization : float
        lambda >= 0. For the closed form relative to the mean eigenvalue of Abar Abar^T; for the cosines as it is.
    solver : {"closed-form", "cosine"}
        Which objective.

    Returns
    -------
    Tensor
        Bbar + dB ``(d_out, r)``, float64.
    """
    Bbar = mean.B.to(torch.float64)
    # Abar^T = V diag(S) U^T. Dividing by singular values, not by the Gram matrix, neither squares the condition number
    # nor minds an Abar that lost rank.
    V, S, Ut = torch.linalg.svd(mean.A.to(torch.float64).T, full_matrices=False)  # (d_in, q), (q,), (q, r)
    U = Ut.T
    live = torch.gt(S, S.max() * max(mean.A.shape) * torch.finfo(torch.float64).eps)
    live &= torch.ge(S, CANCELLED * own_sizes(factors, weights, U))
    if solver == "cosine":
        return Bbar + _cosine_correction(factors, weights, mean, (U[:, live] * S[live]) @ V[:, live].T, regularization)
    projected = torch.zeros(S.shape[0], Bbar.shape[0], dtype=torch.float64)
    for B, A in stacks(factors, weights):
        projected.addmm_((A @ V).T, B.T, alpha=1 / mean.scaling)
    residual = projected.T - Bbar @ (U * S)  # (DW/s - Bbar Abar) V (d_out, q)
    mu = regularization * float(S.square().sum()) / mean.rank
    inverse = torch.where(live, S / (S.square() + mu), 0.0)  # Abar^T (Abar Abar^T + mu I)^-1 = V diag(inverse) U^T
    return Bbar.addmm(residual * inverse, Ut)


def own_sizes(factors: Sequence[LoraFactors], weights: Sequence[float], U: Tensor) -> Tensor:
    """Return sqrt(sum_k p_k |u^T A_k|^2) for each column u of U ``(r, q)``: what the clients have where Abar has S."""
    square = torch.zeros(U.shape[1], dtype=torch.float64)
    for f, p in zip(factors, weights, strict=True):
        square += p * (U.T @ f.A.to(torch.float64)).square().sum(dim=1)
    return square.sqrt()


def _cosine_correction(
    factors: Sequence[LoraFactors], weights: Sequence[float], mean: LoraFactors, A: Tensor, regularization: float
) -> Tensor:
    """Minimise mean_j (1 - cos(DW[:, j], ((Bbar + dB) A)[:, j])) + lambda |dB|^2 from dB = 0.

    All gradients lie in the span of the clients' B_k: with B* = Q R the unknown is Q^T dB, of min(d_out, R) rows, and
    no ``(d_out, d_in)`` matrix is formed where there are fewer ranks than rows.

    Parameters
    ----------
    factors, weights, mean, regularization
        As of `correct`.
    A : Tensor
        Abar without the directions in which it cancelled, ``(r, d_in)``.

    Returns
    -------
    Tensor
        dB ``(d_out, r)``.
    """
    B_star, A_star = stack(factors, weights)
    Q, R = torch.linalg.qr(B_star)  # (d_out, m), (m, R), m = min(d_out, R)
    target = R @ A_star  # Q^T DW (m, d_in)
    begun = Q.T @ mean.B.to(torch.float64)  # (m, r); Bbar lies in the span of the B_k
    lengths, sizes = target.norm(dim=0), (begun @ A).norm(dim=0)  # (d_in,)
    seen = torch.gt(lengths, EMPTY * lengths.max()) & torch.gt(sizes, EMPTY * sizes.max())
    if not seen.any():
        return torch.zeros_like(mean.B, dtype=torch.float64)
    directions, rows = target[:, seen] / lengths[seen], A[:, seen]
    C = torch.zeros_like(begun, requires_grad=True)
    descent = torch.optim.LBFGS(
        [C], max_iter=COSINE_STEPS, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        descent.zero_grad()
        X = (begun + C) @ rows  # (m, columns seen)
        unlike = 1 - (directions * X).sum(dim=0) / X.norm(dim=0)
        value: Tensor = unlike.sum() / A.shape[1] + regularization * C.square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        descent.step(objective)  # type: ignore[no-untyped-call]
    correction: Tensor = Q @ C.detach()
    return correction


class LoraFairOptions(StrategyOptions):
    """Options of LoRA-FAIR."""

    solver: Solver = Field(
        "closed-form",
        description="closed-form: nearest product, ours; cosine: by columns, as code derived from the authors' has it",
    )
    regularization: float = Field(
        REGULARIZATION["closed-form"],
        ge=0,
        description="lambda, how dearly B is moved: 0 projects on row(Abar), large values approach fedit; cosine: 1",
    )

    @model_validator(mode="before")
    @classmethod
    def _each_solver_has_its_own(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("solver") == "cosine":
            return {"regularization": REGULARIZATION["cosine"], **values}
        return values


class LoraFair(AdapterStrategy):
    """Weighted means, with B corrected towards the mean of products (arXiv 2411.14961)."""

    name = "lora-fair"
    capabilities = Capabilities(
        paper="arXiv 2411.14961",
        sends="Abar, Bbar + dB",
        exact=f"only where A is frozen ({FROZEN_A_KINDS}); else the nearest product whose rows lie in row(Abar)",
        needs_single_factors=True,
    )
    Options = LoraFairOptions
    options: LoraFairOptions

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average the cohort, then correct B of every layer; see `correct`."""
        if not self.trains_a:  # the mean is exact, dB = 0
            return weighted_mean(updates, current, trains_a=False)
        cohort = list(updates)
        weights = client_weights(cohort)
        mean = weighted_mean(cohort, current)
        merged = {}
        for layer, f in mean.factors.items():
            B = correct(
                [update.factors[layer] for update in cohort],
                weights,
                f,
                self.options.regularization,
                self.options.solver,
            )
            merged[layer] = replace(f, B=B.to(f.B))
        return AdapterState(merged, mean.dense)
