"""Singular value decompositions of weighted sums of products, in factor space: DW is never formed.

With B* = Q_B R_B and (A*)^T = Q_A R_A, DW = B* A* = Q_B (R_B R_A^T) Q_A^T, and only the core, of
min(d_out, R) x min(d_in, R), is decomposed (`decompose`). `sketch` spares even that where R is large: N. Halko,
P. Martinsson, J. Tropp, "Finding Structure with Randomness", SIAM Review 53, 2011, applied to B* A*. What clients send
as float32 is decomposed in float32 to find where to look, and there in float64 (`leading`). `best_rank` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters.state import LoraFactors
from fedpeft.strategies.algebra.factors import stack, stacks

# Dimensions beyond the rank that keep float32 from mixing what is sent with what is not; see `leading`.
MARGIN = 8


@dataclass(frozen=True)
class Spectrum:
    """The live part of DW = U diag(S) V^T, largest first; float64. What is rounding beside S_1 is left out."""

    U: Tensor  # (d_out, q), the largest entry of each column positive
    S: Tensor  # (q,), all positive
    Vt: Tensor  # (q, d_in)

    def first(self, rank: int) -> Spectrum:
        """Return the first `rank` directions alone."""
        return Spectrum(self.U[:, :rank], self.S[:rank], self.Vt[:rank])


def decompose(factors: Sequence[LoraFactors], weights: Sequence[float]) -> Spectrum:
    """Decompose DW of one layer; `weights` are the clients' p_k."""
    B, A = stack(factors, weights)
    Q_B, R_B = torch.linalg.qr(B)  # (d_out, m), (m, R), m = min(d_out, R)
    Q_A, R_A = torch.linalg.qr(A.T)  # (d_in, n), (n, R), n = min(d_in, R)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return _live(Q_B @ U, S, Vt @ Q_A.T, B.shape[1])


def sketch(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    size: int,
    power_iterations: int,
    random: np.random.Generator,
) -> Spectrum:
    """Decompose the projection of DW on a range of at most `size` dimensions, found by products with random vectors.

    Parameters
    ----------
    factors, weights
        As for `decompose`.
    size : int
        Dimensions of the range, the wanted rank and some more; exact where it is no less than the rank of DW.
    power_iterations : int
        How often the range is multiplied by DW DW^T, which suppresses small singular values.
    random : numpy.random.Generator
        Where the random vectors come from.
    """
    d_in, d_out = factors[0].A.shape[1], factors[0].B.shape[0]
    size = min(size, d_out, d_in, sum(f.rank for f in factors))
    start = torch.from_numpy(random.standard_normal((d_in, size)))
    return _project(factors, weights, _times(factors, weights, start), power_iterations)


def leading(factors: Sequence[LoraFactors], weights: Sequence[float], size: int) -> Spectrum:
    """Decompose DW of clients that send no more than float32, exact in the first directions of at most `size`.

    Where `sketch` begins at random, this begins at the range that `decompose` finds, in float32. All that follows is
    float64, and one multiplication by DW DW^T reduces what float32 left of other directions as it does in `sketch`.
    Half the time and a third of the memory of `decompose`.
    """
    plain = [f.plain() for f in factors]
    R_A = _triangle(f.A.to(torch.float32).T for f in plain)  # (n, R), n = min(d_in, R)
    R_B = _triangle(p * f.scaling * f.B.to(torch.float32) for f, p in zip(plain, weights, strict=True))  # (m, R)
    core = R_B @ R_A.T
    del R_B  # it may be large, as all of these are
    V = torch.linalg.svd(core, full_matrices=False).Vh[:size].T  # (n, size)
    coordinates = (R_A.T @ V).to(torch.float64)  # (R, size), with B* coordinates = DW Q_A V
    span = torch.zeros(factors[0].B.shape[0], V.shape[1], dtype=torch.float64)
    start = 0
    for B, _ in stacks(factors, weights):
        span.addmm_(B, coordinates[start : start + B.shape[1]])
        start += B.shape[1]
    return _project(factors, weights, span, 1)


def _triangle(parts: Iterable[Tensor]) -> Tensor:
    """Return R of the QR decomposition of a row of matrices."""
    R: Tensor = torch.linalg.qr(torch.cat(list(parts), dim=1), mode="r").R
    return R


def _project(factors: Sequence[LoraFactors], weights: Sequence[float], span: Tensor, power_iterations: int) -> Spectrum:
    """Decompose the projection of DW on the range of (DW DW^T)^power_iterations span; span ``(d_out, size)``."""
    Q = torch.linalg.qr(span).Q  # (d_out, size)
    for _ in range(power_iterations):  # orthogonal at each step, else all columns turn into the first direction
        Z = torch.linalg.qr(_times(factors, weights, Q, transposed=True)).Q  # (d_in, size)
        Q = torch.linalg.qr(_times(factors, weights, Z)).Q
    V, S, Ut = torch.linalg.svd(_times(factors, weights, Q, transposed=True), full_matrices=False)
    return _live(Q @ Ut.T, S, V.T, sum(f.rank for f in factors))


def _times(factors: Sequence[LoraFactors], weights: Sequence[float], X: Tensor, transposed: bool = False) -> Tensor:
    """Return DW X or DW^T X in float64."""
    d_in, d_out = factors[0].A.shape[1], factors[0].B.shape[0]
    total = torch.zeros(d_in if transposed else d_out, X.shape[1], dtype=torch.float64)
    for B, A in stacks(factors, weights):
        left, right = (A.T, B.T) if transposed else (B, A)
        total.addmm_(left, right @ X)
    return total


def _live(U: Tensor, S: Tensor, Vt: Tensor, total: int) -> Spectrum:
    """Drop what rounding leaves of directions that DW lacks, and fix signs; `total` is R."""
    noise = S.max() * max(U.shape[0], Vt.shape[1], total) * torch.finfo(torch.float64).eps
    q = int(torch.gt(S, noise).sum())
    U, S, Vt = U[:, :q], S[:q], Vt[:q]
    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True))[0].sign()  # (q,)
    return Spectrum(U * signs, S, signs[:, None] * Vt)


def truncate(spectrum: Spectrum, rank: int, current: LoraFactors) -> LoraFactors:
    """Turn the first `rank` singular directions into factors.

    Parameters
    ----------
    spectrum : Spectrum
        DW, decomposed.
    rank : int
        Ranks of the result; those that the spectrum lacks must be no more than rows of ``current.A``.
    current : LoraFactors
        What the clients started from; the result has its scaling and types, and rows of its A where it must be filled.

    Returns
    -------
    LoraFactors
        A ``(rank, d_in)`` and B ``(d_out, rank)``, whose product with the scaling is the best approximation of DW.
    """
    U, S, Vt = spectrum.U[:, :rank], spectrum.S[:rank], spectrum.Vt[:rank]
    root = S.sqrt()
    spare = _spare_rows(Vt, current.A.to(torch.float64), rank - len(S))
    A = torch.cat([root[:, None] * Vt, spare])
    B = torch.cat([U * root / current.scaling, torch.zeros(U.shape[0], len(spare), dtype=torch.float64)], dim=1)
    return LoraFactors(A.to(current.A), B.to(current.B), current.scaling)


def _spare_rows(Vt: Tensor, rows: Tensor, count: int) -> Tensor:
    """Choose `count` of the rows, each the one with most outside of the span of Vt and of those chosen before it.

    Rows inside of that span would learn too, but what the adapter can reach would be smaller than it was.
    """
    residual = rows - (rows @ Vt.T) @ Vt
    chosen: list[int] = []
    for _ in range(count):
        outside = residual.norm(dim=1)
        outside[chosen] = -1.0
        best = int(outside.argmax())
        chosen.append(best)
        if outside[best] > 0:
            direction = residual[best] / outside[best]
            residual = residual - torch.outer(residual @ direction, direction)
    return rows[chosen]


def best_rank(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    rank: int,
    current: LoraFactors,
    random: np.random.Generator | None = None,
    oversampling: int = 8,
    power_iterations: int = 2,
) -> LoraFactors:
    """Approximate DW of one layer by a product of `rank` ranks.

    Parameters
    ----------
    factors : sequence of LoraFactors
        The clients' factors; A_k ``(r_k, d_in)``, B_k ``(d_out, r_k)``.
    weights : sequence of float
        Their weights p_k.
    rank : int
        r, at most that of `current` where DW has fewer directions.
    current : LoraFactors
        See `truncate`.
    random : numpy.random.Generator, optional
        If given, the randomized solver draws from it; the decomposition is exact otherwise.
    oversampling, power_iterations : int
        Of the randomized solver: dimensions beyond `rank`, and see `sketch`.

    Returns
    -------
    LoraFactors
        A ``(rank, d_in)`` and B ``(d_out, rank)``. The first r_k ranks are the best approximation of rank r_k.
    """
    if random is not None:
        spectrum = sketch(factors, weights, rank + oversampling, power_iterations, random)
    elif any(torch.float64 in (f.A.dtype, f.B.dtype) for f in factors):
        spectrum = decompose(factors, weights)
    else:
        spectrum = leading(factors, weights, rank + MARGIN)
    return truncate(spectrum, rank, current)
