"""Changes of the frozen base, for methods whose result is an adapter and a base that has moved.

A round's change is a step, B A of scaling 1. The sum of all steps gains rank with every round: it is kept as the fewest
factors that hold it, by a QR of each stack and an SVD of the small core, and as a matrix once that is smaller, which is
where rank (d_in + d_out) >= d_in d_out. Clients hold the base as the run began: they are sent the sum of all earlier
steps and, apart from it, the last one, which is what the method's paper counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.adapters.base_change import matrix
from fedpeft.adapters.state import AdapterState, BaseChange, LoraFactors
from fedpeft.strategies.algebra.factors import sum_of
from fedpeft.strategies.algebra.spectra import Spectrum, decompose

Piece = LoraFactors | Tensor


def is_dense_smaller(rank: int, d_in: int, d_out: int) -> bool:
    """Tell whether a layer's change of so many ranks is no smaller as factors than as a matrix."""
    return rank * (d_in + d_out) >= d_in * d_out


def step_floats(rank: int, d_in: int, d_out: int) -> int:
    """Return how many numbers a step of so many ranks takes on the wire."""
    return d_in * d_out if is_dense_smaller(rank, d_in, d_out) else rank * (d_in + d_out)


def as_step(B: Tensor, A: Tensor, like: Tensor) -> Piece | None:
    """Make the step B A, of the type of `like`; None where it has no ranks."""
    if A.shape[0] == 0:
        return None
    if is_dense_smaller(A.shape[0], A.shape[1], B.shape[0]):
        return (B @ A).to(like)
    return LoraFactors(A.to(like).contiguous(), B.to(like).contiguous(), 1.0)


def advance(before: Mapping[str, BaseChange], steps: Mapping[str, Piece | None]) -> dict[str, BaseChange]:
    """Add a round's steps to what the base has become; layers without any change are left out."""
    after = {}
    for layer, step in steps.items():
        change = before.get(layer, BaseChange())
        moved = BaseChange(add(change.earlier, change.last), step)
        if moved.earlier is not None or moved.last is not None:
            after[layer] = moved
    return after


def add(one: Piece | None, other: Piece | None) -> Piece | None:
    """Return the sum of two changes of a layer in the smaller of the two forms."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, LoraFactors) and isinstance(other, LoraFactors):
        spectrum = decompose([one, other], [1.0, 1.0])
        if not is_dense_smaller(len(spectrum.S), one.A.shape[1], one.B.shape[0]):
            return _factors(spectrum, one.A)
    like = one if isinstance(one, Tensor) else one.A
    return (matrix(one) + matrix(other)).to(like)


def exact_sum(state: AdapterState) -> AdapterState:
    """Return the adapter alone that does to the base of the run's beginning what adapter and changed base do together.

    Parameters
    ----------
    state : AdapterState
        Its base may have changed.

    Returns
    -------
    AdapterState
        Layers whose base has changed have scaling 1 and as many ranks as their sum needs, at least one; nothing is
        left in ``base``.
    """
    factors = dict(state.factors)
    for layer, change in state.base.items():
        f = state.factors[layer]
        pieces = [piece for piece in (f, change.earlier, change.last) if piece is not None]
        factors[layer] = _factors(decompose([sum_of(pieces)], [1.0]), f.A)
    return AdapterState(factors, state.dense)


def _factors(spectrum: Spectrum, like: Tensor) -> LoraFactors:
    root = spectrum.S.sqrt()
    A, B = root[:, None] * spectrum.Vt, spectrum.U * root
    if len(root) == 0:  # nothing at all; PEFT knows no rank 0
        A, B = torch.zeros(1, A.shape[1]), torch.zeros(B.shape[0], 1)
    return LoraFactors(A.to(like).contiguous(), B.to(like).contiguous(), 1.0)
