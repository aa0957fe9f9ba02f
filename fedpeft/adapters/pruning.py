"""HetLoRA's rank self-pruning at a client: press the last ranks together, and leave them out once they have shrunk.

Y. J. Cho et al., arXiv 2401.06432. With q < r the ranks that would be left, the client adds to its loss

    lambda sum_l |B_l[:, q:]| |A_l[q:, :]|

over its layers l, and sends q ranks only if that sum is smaller after training than it was before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedpeft.adapters.draws import first_ranks
from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX, Role, role_of
from fedpeft.errors import MessageError

if TYPE_CHECKING:
    from fedpeft.adapters.adapted import AdaptedModel

PRUNED_RANK, TAIL_PENALTY = "pruned-rank", "tail-penalty"  # q and lambda among an order's settings


@dataclass(frozen=True)
class Tail:
    """The ranks from q on of a resident adapter.

    Parameters
    ----------
    factors : list of tuple of torch.nn.Parameter
        A ``(r, d_in)`` and B ``(d_out, r)`` of each layer, live.
    kept : int
        q.
    penalty : float
        lambda.
    before : float
        Its size as the round begins.
    """

    factors: list[tuple[nn.Parameter, nn.Parameter]]
    kept: int
    penalty: float
    before: float

    @classmethod
    def of(cls, adapted: AdaptedModel, settings: Mapping[str, object]) -> Tail | None:
        """Look at the adapter that is loaded now; None where an order's settings leave all ranks alone.

        Raises
        ------
        MessageError
            Settings that are no numbers.
        """
        if PRUNED_RANK not in settings:
            return None
        kept, penalty = settings[PRUNED_RANK], settings.get(TAIL_PENALTY)
        if not isinstance(kept, int) or not isinstance(penalty, int | float):
            raise MessageError(f"{PRUNED_RANK} = {kept!r}, {TAIL_PENALTY} = {penalty!r}, expected numbers")
        names = [name for name in adapted.initial if role_of(name) is Role.A]
        pairs = [(name, name.removesuffix(A_SUFFIX) + B_SUFFIX) for name in names]
        factors = [(adapted.parameter(a), adapted.parameter(b)) for a, b in pairs]
        return cls(factors, kept, float(penalty), float(_size(factors, kept).detach()))

    def loss(self) -> Tensor:
        """Return what training adds to its loss, lambda sum_l |B_l[:, q:]| |A_l[q:, :]|, with a gradient."""
        return self.penalty * _size(self.factors, self.kept)

    def left_out(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a client sends: its first q ranks if the others have shrunk since the round began, else all."""
        has_shrunk = float(_size(self.factors, self.kept).detach()) < self.before
        return first_ranks(tensors, self.kept) if has_shrunk else tensors


def _size(factors: list[tuple[nn.Parameter, nn.Parameter]], kept: int) -> Tensor:
    return torch.stack([B[:, kept:].norm() * A[kept:].norm() for A, B in factors]).sum()
