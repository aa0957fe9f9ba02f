"""LoRA-XS: R between singular vectors of the base's weights (K. Balazy et al., arXiv 2405.17604).

With W0 = U S V^T, cut to r ranks,

    B = U_r,    A = S_r V_r^T,    R drawn from N(0, 1e-5^2).

No rows are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpeft.adapters.kinds.kind import Start
from fedpeft.adapters.kinds.square import Square, install_squares, singular_factors, square_kind
from fedpeft.seeds import generator

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

DEVIATION = 1e-5  # of R


def install(model: PeftModel, start: Start, prepared: object) -> None:
    """Begin every layer at its own weight; each draws an R of its own from the run's seed."""
    import torch

    def begin(layer: str, W: Tensor, rank: int, scaling: float) -> Square:
        U, S, Vt = singular_factors(W, rank)
        R = torch.from_numpy(generator(start.seed, "lora-xs", layer).normal(0.0, DEVIATION, (rank, rank)))
        return Square((S[:, None] * Vt).float().contiguous(), R.float(), U.float().contiguous())

    install_squares(model, begin)


LORA_XS = square_kind("lora-xs", ("default",), install)
