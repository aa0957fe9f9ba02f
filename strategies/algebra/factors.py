"""Linear algebra on LoRA factors: what a server computes of weighted sums of products without forming them.

With client k's factors A_k ``(r_k, d_in)``, B_k ``(d_out, r_k)``, scaling s_k and weight p_k = n_k / sum n, the update
that a round ought to make is

    DW = sum_k p_k s_k B_k A_k = B* A*,    B* = [p_1 s_1 B_1 .. p_K s_K B_K],    A* = [A_1; ..; A_K],

of rank at most R = sum_k r_k. Everything here is computed in float64: results are small, or norms whose terms cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.adapters.state import AdapterState, BaseChange, ClientUpdate, LoraFactors
from fedpeft.errors import AdapterError, TooFewClientsError

# A QR runs at a fraction of a matrix product's speed: shortening a stack pays below this share of its height.
QR_PAYS_BELOW = 0.3
ROWS_AT_ONCE = 512
CLIENTS_AT_ONCE = 8
# A difference of products that is no more than this share of their size is what rounding in float64 leaves.
ROUNDING = 1e-12


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
    return _blocks(B)


def _blocks(B: Tensor) -> Iterator[Tensor]:
    return (B[start : start + ROWS_AT_ONCE] for start in range(0, B.shape[0], ROWS_AT_ONCE))


def squared_norms(terms: Sequence[LoraFactors | Tensor], sums: Sequence[Mapping[int, float]]) -> list[float]:
    """Return the squared Frobenius norms of weighted sums of a layer's changes.

    Parameters
    ----------
    terms : sequence of LoraFactors or Tensor
        Products in factor space, or ``(d_out, d_in)`` matrices where that is how a change of the base is held.
    sums : sequence of mapping of int to float
        Of each sum, by a term's place, what it is multiplied with; the others are left out.

    Returns
    -------
    list of float
        Good to 1e-16 of the terms: where these cancel, what remains is not drowned in their squares.
    """
    factors = {j: term.plain() for j, term in enumerate(terms) if isinstance(term, LoraFactors)}
    matrices = {j: term for j, term in enumerate(terms) if isinstance(term, Tensor)}
    rows_of = {j: f.A.to(torch.float64) for j, f in factors.items()}  # (r_j, d_in)
    columns = torch.cat([f.scaling * f.B.to(torch.float64) for f in factors.values()], dim=1)  # (d_out, sum r_j)
    ends = torch.tensor([f.rank for f in factors.values()]).cumsum(0).tolist()
    span = {j: slice(end - f.rank, end) for (j, f), end in zip(factors.items(), ends, strict=True)}
    d_in = next(iter(rows_of.values())).shape[1]
    squares, at = [0.0] * len(sums), 0
    for block in _blocks(columns) if matrices else _isometric_rows(columns):
        products = {j: block[:, span[j]] @ A for j, A in rows_of.items()}  # (rows, d_in)
        products |= {j: W[at : at + len(block)].to(torch.float64) for j, W in matrices.items()}
        at += len(block)
        for i, wanted in enumerate(sums):
            total = torch.zeros(len(block), d_in, dtype=torch.float64)
            for j, c in wanted.items():
                total.add_(products[j], alpha=c)
            squares[i] += float(total.square_().sum())
    return squares


def aggregation_error(
    updates: Iterable[ClientUpdate], sent: Mapping[str, LoraFactors], offset: Mapping[str, LoraFactors] | None = None
) -> float:
    """Return sqrt(sum_l |DW_l - sent_l|^2 / sum_l |DW_l|^2) over the adapted layers l of `sent`.

    Of adapters without a common start, such as those on disk, this is the error; that of a round is `round_errors`.

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
        0 means exact (about 1e-15 in float64), 1 is what sending nothing gives. Where DW is zero there is nothing to be
        relative to: 0 if `sent` is zero too, else infinity.
    """
    cohort = list(updates)
    weights = client_weights(cohort)
    pairs = []
    for name, f in sent.items():
        terms = [stacked([u.factors[name] for u in cohort], weights), f]
        whole: dict[int, float] = {0: 1}
        if offset and name in offset:
            terms.append(offset[name])
            whole[2] = -1
        pairs.append(squared_norms(terms, [{0: 1, 1: -1}, whole]))
    return _ratio(sum(residual for residual, _ in pairs), sum(target for _, target in pairs))


def stacked(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """Return sum_k weights_k s_k B_k A_k as one product, see `stack`."""
    B, A = stack(factors, weights)
    return LoraFactors(A, B, 1.0)


@dataclass(frozen=True)
class RoundErrors:
    """How far what a round sent is from DW, over all layers as one vector.

    Parameters
    ----------
    of_step : float
        Relative to what the round was to change, |DW - s B_t A_t|, where B_t A_t is the adapter that it began with, at
        its full rank. 0 is exact, 1 what leaving the adapter as it was would give.
    of_total : float
        Relative to all that has been learned, the update since the run began, which grows from round to round.
    """

    of_step: float
    of_total: float


def round_errors(
    updates: Iterable[ClientUpdate],
    current: AdapterState,
    merged: AdapterState,
    offset: Mapping[str, LoraFactors] | None = None,
) -> RoundErrors:
    """Measure a round by its cohort; see `errors_of`."""
    cohort = list(updates)
    weights = client_weights(cohort)
    ideal = {layer: stacked([update.factors[layer] for update in cohort], weights) for layer in current.factors}
    return errors_of(ideal, current, merged, offset)


def errors_of(
    ideal: Mapping[str, LoraFactors | Tensor],
    current: AdapterState,
    merged: AdapterState,
    offset: Mapping[str, LoraFactors] | None = None,
) -> RoundErrors:
    """Measure a round, alike for methods whose adapter goes on, begins anew, or is folded into the base.

    Parameters
    ----------
    ideal : mapping of str to LoraFactors or Tensor
        DW by layer; layers that are not in it do not count.
    current, merged : AdapterState
        What it began with, and what the next one begins with; their changes of the base count.
    offset : mapping of str to LoraFactors, optional
        What the adapter began the run with and the base lacks (pissa and its like), which nobody learned.

    Returns
    -------
    RoundErrors
        Where a norm to be relative to is zero up to rounding, 0 if nothing but rounding was changed, else infinity.
    """
    squares = [0.0] * 5
    resolution = 0.0
    for layer, product in ideal.items():
        begun, sent = current.factors[layer], merged.factors[layer]
        last = merged.base[layer].last if layer in merged.base else None
        earlier = current.base.get(layer, BaseChange())
        learned = [piece for piece in (earlier.earlier, earlier.last) if piece is not None]
        drawn = [offset[layer]] if offset and layer in offset else []
        terms: list[LoraFactors | Tensor] = [product, begun, sent]
        parts = []
        for pieces, sign in (([] if last is None else [last], -1), (learned, 1), (drawn, -1)):
            parts.append({len(terms) + i: float(sign) for i in range(len(pieces))})
            terms += pieces
        folded, before, taken = parts
        residual, step, total = {0: 1.0, 2: -1.0, **folded}, {0: 1.0, 1: -1.0}, {0: 1.0, **before, **taken}
        norms = squared_norms(terms, [residual, step, total, {0: 1.0}, {0: 1.0, **before}])
        squares = [one + other for one, other in zip(squares, norms, strict=True)]
        resolution = max(resolution, 4 * torch.finfo(sent.B.dtype).eps)
    residual_, step_, total_, size, whole = squares
    return RoundErrors(
        _ratio(residual_, step_, size, resolution), _ratio(residual_, total_, max(size, whole), resolution)
    )


def _ratio(residual: float, target: float, size: float = 0.0, resolution: float = 0.0) -> float:
    """Return the root of a ratio of squares; a target that is rounding of terms of a squared `size` counts as zero."""
    if target <= (ROUNDING**2) * size:
        return 0.0 if residual <= resolution**2 * size else math.inf
    return math.sqrt(residual / target)


def sum_of(pieces: Iterable[LoraFactors | Tensor]) -> LoraFactors:
    """Return one product that is the sum of all, in float64; a matrix W enters it as W I."""
    every = [p if isinstance(p, LoraFactors) else LoraFactors(torch.eye(p.shape[1]), p, 1.0) for p in pieces]
    A = torch.cat([f.plain().A.double() for f in every])
    B = torch.cat([f.scaling * f.B.double() for f in every], dim=1)
    return LoraFactors(A, B, 1.0)
