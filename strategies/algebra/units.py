"""Minimal semantic units: single ranks of all clients in one layer, which LoRA-LEGO pools and clusters.

A unit is m_i = [a_i; b_i], with a_i = A_k[i, :] and b_i = s_k B_k[:, i]. Units stay in the type that they came in, and
parts of them become float64 as they are needed, so that the memory beside them is small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.state import LoraFactors

COLUMNS = 1024  # that become float64 at a time
# Inner products of units with themselves are symmetric: this many rows at a time meet only the rows from there on.
ROWS = 256


@dataclass(frozen=True)
class Units:
    """The live ranks of all clients in one layer, |a_i| = |b_i|, in an order that only their content decides."""

    m: Tensor  # (U, d_in + d_out), a_i then b_i, float32 unless a client sent float64
    weights: Tensor  # (U,) p_k of the unit's client
    a_norms: Tensor  # (U,) |a_i| as the client sent it
    d_in: int

    @property
    def a(self) -> Tensor:
        """Rows a_i, ``(U, d_in)``."""
        return self.m[:, : self.d_in]

    @property
    def b(self) -> Tensor:
        """Rows b_i, ``(U, d_out)``."""
        return self.m[:, self.d_in :]


def pool(factors: Sequence[LoraFactors], weights: Sequence[float]) -> Units:
    """Collect the clients' ranks of one layer; `weights` are their p_k."""
    p = torch.cat([torch.full((f.rank,), w, dtype=torch.float64) for f, w in zip(factors, weights, strict=True)])
    scaling = torch.cat([torch.full((f.rank,), f.scaling, dtype=torch.float64) for f in factors])
    d_in, d_out = factors[0].A.shape[1], factors[0].B.shape[0]
    double = any(torch.float64 in (f.A.dtype, f.B.dtype) for f in factors)
    m = torch.empty(len(p), d_in + d_out, dtype=torch.float64 if double else torch.float32)
    a, b = m[:, :d_in], m[:, d_in:]
    torch.cat([f.A.to(m) for f in factors], out=a)
    torch.cat([f.B.to(m).T for f in factors], out=b)
    a_norms, b_norms = norms(a), scaling.abs() * norms(b)
    live = ((a_norms > 0) & (b_norms > 0) & (p > 0)).nonzero()[:, 0].tolist()
    some = (a[start : start + ROWS] for start in range(0, len(a), ROWS))
    largest = torch.cat([rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)) for rows in some])  # (R, 1)
    gauge = (b_norms / a_norms).sqrt()[:, None] * largest.sign()
    a_factor, b_factor = gauge.to(m), (scaling[:, None] / gauge).to(m)  # (R, 1)
    sizes, ties = (a_norms * b_norms).to(torch.float32).tolist(), p.tolist()
    often = Counter(sizes)

    def content(i: int) -> bytes:
        if often[sizes[i]] == 1:  # nothing to tell apart
            return b""
        # Rounded to float32, it does not see what the gauge leaves in the last digits; -0.0 becomes 0.0.
        unit = torch.cat([a[i] * a_factor[i], b[i] * b_factor[i]])
        return unit.to(torch.float32).add_(0.0).numpy().tobytes()

    order = sorted(live, key=lambda i: (-sizes[i], content(i), ties[i]))
    for part, factor in ((a, a_factor), (b, b_factor)):  # in place, since m is large
        for columns in columns_of(part):
            columns[: len(order)] = columns[order].mul_(factor[order])
    return Units(m[: len(order)], p[order], a_norms[order], d_in)


def norms(rows: Tensor) -> Tensor:
    """Return the norm of each row, in float64."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths.to(torch.float64)


def columns_of(m: Tensor) -> Iterator[Tensor]:
    """Yield the columns of m, a few at a time."""
    return (m[:, start : start + COLUMNS] for start in range(0, m.shape[1], COLUMNS))


def inner_products(vectors: Tensor, m: Tensor) -> Tensor:
    """Return the inner products ``(k, U)`` of vectors ``(k, d)``, float64, with the rows of m ``(U, d)``."""
    result = torch.zeros(len(vectors), len(m), dtype=torch.float64)
    for v, x in zip(columns_of(vectors), columns_of(m), strict=True):
        result.addmm_(v, x.T.to(torch.float64))
    return result


def write_gram(m: Tensor, out: Tensor) -> None:
    """Write the inner products of the rows of m to `out`, ``(U, U)``; they are symmetric, so half are computed."""
    for i in range(0, len(m), ROWS):
        out[i : i + ROWS, i:] = m[i : i + ROWS] @ m[i:].T
        out[i + ROWS :, i : i + ROWS] = out[i : i + ROWS, i + ROWS :].T
