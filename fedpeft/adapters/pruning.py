"""HetLoRA's rank self-pruning at a client: press the last ranks together, and leave them out once they have shrunk.

Y. J. Cho et al., arXiv 2401.06432. With q < r the ranks that would be left, the client adds to its loss

    lambda sum_l |B_l[:, q:]| |A_l[q:, :]|

over its layers l, and sends q ranks only if that sum is smaller after training than it was before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX, Role, role_of


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
    """

    factors: list[tuple[nn.Parameter, nn.Parameter]]
    kept: int
    penalty: float

    @classmethod
    def of(cls, adapted: AdaptedModel, kept: int, penalty: float) -> Tail:
        """Look at the adapter that is loaded now."""
        names = [name for name in adapted.initial if role_of(name) is Role.A]
        pairs = [(name, name.removesuffix(A_SUFFIX) + B_SUFFIX) for name in names]
        return cls([(adapted.parameter(a), adapted.parameter(b)) for a, b in pairs], kept, penalty)

    def size(self) -> Tensor:
        """Return the sum over layers of |B[:, q:]| |A[q:, :]|, with a gradient."""
        sizes = [B[:, self.kept :].norm() * A[self.kept :].norm() for A, B in self.factors]
        return torch.stack(sizes).sum()

    def loss(self) -> Tensor:
        """Return what training adds to its loss."""
        return self.penalty * self.size()
