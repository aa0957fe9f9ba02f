"""Linear algebra on LoRA factors: what a server computes of weighted sums of products without forming them.

With client k's factors A_k ``(r_k, d_in)``, B_k ``(d_out, r_k)``, scaling s_k and weight p_k = n_k / sum n, the update
that a round ought to make is

    DW = sum_k p_k s_k B_k A_k = B* A*,    B* = [p_1 s_1 B_1 .. p_K s_K B_K],    A* = [A_1; ..; A_K],

of rank at most R = sum_k r_k. Everything here is computed in float64: results are small, or norms whose terms cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedpeft.errors import AdapterError, TooFewClientsError
from fedpeft.state import AdapterState, ClientUpdate, LoraFactors

# A QR runs at a fraction of a matrix product's speed: shortening a stack pays below this share of its height.
QR_PAYS_BELOW = 0.3
ROWS_AT_ONCE = 512
CLIENTS_AT_ONCE = 8


def client_weights(updates: Sequence[ClientUpdate]) -> list[float]:
    """Return p_k = n_k / sum n, n_k the rows that client k trained on.

    Raises
    ------
    TooFewClientsError
        No client trained on any row.
    """
    total = sum(update.num_examples for update in updates)
    if total <= 0:
        raise no_rows(len(updates))
    return [update.num_examples / total for update in updates]


def no_rows(clients: int) -> TooFewClientsError:
    """Return the error of a cohort that has nothing to merge."""
    return TooFewClientsError(
        f"{clients} updates with 0 rows in all cannot be merged; at least one client must train on one row"
    )


def require_layers(update: ClientUpdate, current: AdapterState) -> None:
    """Raise AdapterError unless a client's layers are those of the adapter that is merged into."""
    if odd := sorted(update.factors.keys() ^ current.factors.keys()):
        raise AdapterError(
            f"client '{update.client_id}' and the merged adapter do not adapt the same layers: {odd[0]} is in one "
            "only; merge adapters with the same target modules"
        )


def whole_cohort(updates: Iterable[ClientUpdate], current: AdapterState) -> list[ClientUpdate]:
    """Return all updates of a round, whose layers are those of the adapter; see `require_layers`."""
    cohort = list(updates)
    for update in cohort:
        require_layers(update, current)
    return cohort


def stack(factors: Sequence[LoraFactors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return B* ``(d_out, R)`` and A* ``(R, d_in)`` in float64, with B* A* = sum_k weights_k s_k B_k A_k."""
    plain = [f.plain() for f in factors]
    scale = [p * f.scaling for f, p in zip(plain, weights, strict=True) for _ in range(f.rank)]
    B = torch.cat([f.B for f in plain], dim=1).to(torch.float64).mul_(torch.tensor(scale, dtype=torch.float64))
    A = torch.cat([f.A for f in plain], dim=0).to(torch.float64)
    return B, A


def stacks(factors: Sequence[LoraFactors], weights: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield B* and A* of a few clients after another; those of all would be as large as all uploads, or twice that."""
    for start in range(0, len(factors), CLIENTS_AT_ONCE):
        yield stack(factors[start : start + CLIENTS_AT_ONCE], weights[start : start + CLIENTS_AT_ONCE])


def inner(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> float:
    """Return the Frobenius inner product <B1 A1, B2 A2>; B ``(d_out, r)``, A ``(r, d_in)``, ranks may differ.

    Good to 1e-16 of |B1| |A1| |B2| |A2|: for norms of differences near zero use `norm`.
    """
    left = torch.einsum("oi,oj->ij", B1.to(torch.float64), B2.to(torch.float64))  # (r1, r2)
    right = torch.einsum("id,jd->ij", A1.to(torch.float64), A2.to(torch.float64))  # (r1, r2)
    return float((left * right).sum())


def norm(B: Tensor, A: Tensor) -> float:
    """Return the Frobenius norm |B A|, B ``(d_out, R)``, A ``(R, d_in)``."""
    A = A.to(torch.float64)
    return math.sqrt(sum(float((rows @ A).square().sum()) for rows in _isometric_rows(B.to(torch.float64))))


def _isometric_rows(B: Tensor) -> Iterator[Tensor]:
    """Yield blocks of rows of a matrix C with |C M| = |B M| for every M; B is ``(d_out, R)``.

    C is the triangle of B = QC where R is small beside d_out, which makes the product with M ``(R, d_in)`` cheap. A
    Gram matrix would be cheaper still, but it squares the terms and so leaves 1e-8 of them where they ought to cancel.
    Where R nears d_out, or exceeds it, a triangle saves little or nothing: then C is B itself. The blocks bound the
    memory, so that no ``(d_out, d_in)`` matrix is ever held.
    """
    if B.shape[1] < QR_PAYS_BELOW * B.shape[0]:
        B = torch.linalg.qr(B, mode="r").R  # (R, R)
    for start in range(0, B.shape[0], ROWS_AT_ONCE):
        yield B[start : start + ROWS_AT_ONCE]


def squared_distance(
    factors: Sequence[LoraFactors], weights: Sequence[float], sent: LoraFactors, offset: LoraFactors | None = None
) -> tuple[float, float]:
    """Return |DW - sent|^2 and |DW - offset|^2 of one layer, DW the weighted sum of the clients' products."""
    B, A = stack(factors, weights)
    sent = sent.plain()
    A_sent = sent.A.to(torch.float64)
    total = A.shape[0]
    start = LoraFactors(A_sent[:0], B[:, :0], 1.0) if offset is None else offset
    parts = [B, -sent.scaling * sent.B.to(torch.float64), -start.scaling * start.B.to(torch.float64)]
    split = total + A_sent.shape[0]
    residual = target = 0.0
    for rows in _isometric_rows(torch.cat(parts, dim=1)):  # (d_out, R + r + r0)
        product = rows[:, :total] @ A  # (rows, d_in)
        target += float((product + rows[:, split:] @ start.A.to(torch.float64)).square().sum())
        residual += float(product.addmm_(rows[:, total:split], A_sent).square().sum())
    return residual, target


def relative_error(factors: Sequence[LoraFactors], weights: Sequence[float], sent: LoraFactors) -> float:
    """Return |DW - sent| / |DW| of one layer, in the Frobenius norm.

    Parameters
    ----------
    factors : sequence of LoraFactors
        The clients' factors of the layer; ranks and scalings may differ.
    weights : sequence of float
        Their weights p_k.
    sent : LoraFactors
        What the server sends down in place of DW.

    Returns
    -------
    float
        0 means exact (about 1e-15 in float64), 1 is what sending nothing gives. Where DW is zero there is nothing to be
        relative to: 0 if `sent` is zero too, else infinity.
    """
    return _ratio(*squared_distance(factors, weights, sent))


def aggregation_error(
    updates: Iterable[ClientUpdate], sent: Mapping[str, LoraFactors], offset: Mapping[str, LoraFactors] | None = None
) -> float:
    """Return sqrt(sum_l |DW_l - sent_l|^2 / sum_l |DW_l|^2) over the adapted layers l of `sent`.

    Parameters
    ----------
    updates : iterable of ClientUpdate
        A round's cohort; all of it is held, since DW needs single factors.
    sent : mapping of str to LoraFactors
        What the server made of it, by layer.
    offset : mapping of str to LoraFactors, optional
        What the adapter began with and the base lacks (pissa and its like): no update, and so no part of |DW_l|.

    Returns
    -------
    float
        As `relative_error`, of all layers as one vector.
    """
    cohort = list(updates)
    weights = client_weights(cohort)
    start = offset or {}
    pairs = [
        squared_distance([u.factors[name] for u in cohort], weights, f, start.get(name)) for name, f in sent.items()
    ]
    return _ratio(sum(residual for residual, _ in pairs), sum(target for _, target in pairs))


def _ratio(residual: float, target: float) -> float:
    if target == 0:
        return 0.0 if residual == 0 else math.inf
    return math.sqrt(residual / target)


def sum_of(pieces: Iterable[LoraFactors | Tensor]) -> LoraFactors:
    """Return one product that is the sum of all, in float64; a matrix W enters it as W I."""
    every = [p if isinstance(p, LoraFactors) else LoraFactors(torch.eye(p.shape[1]), p, 1.0) for p in pieces]
    A = torch.cat([f.plain().A.double() for f in every])
    B = torch.cat([f.scaling * f.B.double() for f in every], dim=1)
    return LoraFactors(A, B, 1.0)


def sent_products(state: AdapterState) -> dict[str, LoraFactors]:
    """Return what a round's result adds to the base before the round: its adapter, and its last step; by layer."""
    found = {}
    for layer, f in state.factors.items():
        last = state.base[layer].last if layer in state.base else None
        found[layer] = f if last is None else sum_of([f, last])
    return found
