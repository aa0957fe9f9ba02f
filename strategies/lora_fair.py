"""LoRA-FAIR: the means of FedIT, and a correction of B that brings their product nearer to the mean of products.

J. Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
arXiv 2411.14961. With DW = sum_k p_k s_k B_k A_k the ideal update and all B_k on one scale s, the server finds

    min over dB of  S(DW, (Bbar + dB) Abar) + lambda |dB|

in each layer and sends (Abar, Bbar + dB), from which clients start the next round. Two solvers:

``closed-form`` (default) takes the squared distance for S, and squares the penalty; per layer, one r x r system:

    dB = (DW/s - Bbar Abar) Abar^T (Abar Abar^T + mu I)^-1,    mu = lambda tr(Abar Abar^T) / r.

Scaled by the mean eigenvalue, one lambda means the same in every layer. lambda = 0 projects DW on the rows of Abar;
lambda -> infinity is FedIT. In no layer is the product that is sent further from DW than FedIT's.

``cosine`` is the paper's objective, S = 1 - cos (in print it is a similarity that is minimised). Where the paper runs
SGD, this is proximal gradient descent from dB = 0, deterministic and to convergence. |dB| has no gradient at 0; the
proximal step is exact there, and dB stays 0 where the cosine's gradient is no longer than lambda. The objective fixes
the direction of the product, not its length, so that it may end further from DW than FedIT.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedpeft.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import Capabilities
from fedpeft.strategies.factors import client_weights, norm, stack, stacks
from fedpeft.strategies.means import weighted_mean

Solver = Literal["closed-form", "cosine"]

# The cosine solver stops where the gradient's terms cancel to this share. The bound on its steps is met only where
# Abar is nearly singular, which drawn at random and trained a little it is not.
COSINE_TOLERANCE = 1e-10
COSINE_STEPS = 2000


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
        lambda >= 0. For the closed form relative to the mean eigenvalue of Abar Abar^T; for the cosine the paper's own.
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
    projected = torch.zeros(S.shape[0], Bbar.shape[0], dtype=torch.float64)
    for B, A in stacks(factors, weights):
        projected.addmm_((A @ V).T, B.T, alpha=1 / mean.scaling)
    projected = projected.T  # (DW/s) V (d_out, q)
    if solver == "cosine":
        length = norm(*stack(factors, weights)) / mean.scaling
        correction = _cosine_correction(projected, length, Bbar @ U, S, regularization)
    else:
        residual = projected - Bbar @ (U * S)  # (DW/s - Bbar Abar) V
        mu = regularization * float(S.square().sum()) / mean.rank
        live = torch.gt(S, S.max() * max(mean.A.shape) * torch.finfo(torch.float64).eps)
        inverse = torch.where(live, S / (S.square() + mu), 0.0)  # Abar^T (Abar Abar^T + mu I)^-1 = V diag(inverse) U^T
        correction = residual * inverse  # dB U
    return Bbar.addmm(correction, Ut)


def _cosine_correction(target: Tensor, length: float, start: Tensor, S: Tensor, regularization: float) -> Tensor:
    """Minimise 1 - cos(DW, (Bbar + dB) Abar) + lambda |dB| by proximal gradient from dB = 0.

    Only projections matter. With C = dB U, the product in the basis of Abar's rows is X = (Bbar U + C) diag(S), and
    <DW/s, (Bbar + dB) Abar> = <target, X>. All gradients stay in the span of the columns of `target` and `start`, so
    that the unknown is a core of at most 2q x q.

    Parameters
    ----------
    target : Tensor
        (DW/s) V, ``(d_out, q)``.
    length : float
        Norm of DW/s, which holds more than its projection.
    start : Tensor
        Bbar U, ``(d_out, q)``.
    S : Tensor
        Singular values of Abar, ``(q,)``.
    regularization : float
        lambda.

    Returns
    -------
    Tensor
        dB U ``(d_out, q)``; zero where DW or Bbar Abar is zero, as the cosine is then undefined.
    """
    if length == 0 or not (start * S).any():
        return torch.zeros_like(start)
    basis = torch.linalg.qr(torch.cat([target, start], dim=1)).Q  # (d_out, m), m = min(d_out, 2q)
    t = torch.einsum("om,oq->mq", basis, target) / length
    b = torch.einsum("om,oq->mq", basis, start)

    def dissimilarity(C: Tensor) -> tuple[float, Tensor]:
        X = (b + C) * S  # (m, q)
        size = X.norm()
        cosine = (t * X).sum() / size
        return float(1 - cosine), -(t - cosine * X / size) / size * S

    C = torch.zeros_like(b)
    value, gradient = dissimilarity(C)
    enough = COSINE_TOLERANCE * float((t * S).norm() / (b * S).norm())
    step = float((b * S).square().sum() / S.max() ** 2)  # in units of |C|^2, as the objective has none
    for _ in range(COSINE_STEPS):
        while True:  # halve the step until the quadratic model bounds the objective
            trial = _shrink(C - step * gradient, step * regularization)
            move = trial - C
            bound = value + float((gradient * move).sum() + move.square().sum() / (2 * step))
            trial_value, trial_gradient = dissimilarity(trial)
            if trial_value <= bound + 1e-15 or float(move.norm()) <= enough * step:
                break
            step /= 2
        if float(move.norm()) <= enough * step:
            break
        curvature = float((move * (trial_gradient - gradient)).sum() / move.square().sum())
        C, value, gradient = trial, trial_value, trial_gradient
        step = 1 / curvature if curvature > 0 else 2 * step  # Barzilai and Borwein's guess at the next
    correction: Tensor = basis @ C
    return correction


def _shrink(C: Tensor, amount: float) -> Tensor:
    """Return the minimiser over X of |X - C|^2 / 2 + amount |X|: C shortened by `amount`, to no less than 0."""
    size = float(C.norm())
    return C * (1 - amount / size) if size > amount else torch.zeros_like(C)


class LoraFairOptions(StrategyOptions):
    """Options of LoRA-FAIR."""

    solver: Solver = Field("closed-form", description="closed-form: nearest product; cosine: the paper's objective")
    regularization: float = Field(
        0.01, ge=0, description="lambda, how dearly B is moved: 0 projects on row(Abar), large values approach fedit"
    )


class LoraFair(AdapterStrategy):
    """Weighted means, with B corrected towards the mean of products (arXiv 2411.14961)."""

    name = "lora-fair"
    capabilities = Capabilities(
        paper="arXiv 2411.14961",
        sends="Abar, Bbar + dB",
        exact="only where A is frozen (ffa-lora); else the nearest product whose rows lie in row(Abar)",
        needs_single_factors=True,
    )
    Options = LoraFairOptions
    options: LoraFairOptions

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState) -> AdapterState:
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
