"""LN tuning: weights and biases of norms, and nothing else (B. Zhao et al., arXiv 2312.11420); linear in them.

PEFT trains a copy of each norm. ``adapter.targets`` names norms here; unset, or all-linear, means all outside the head.
Norms that keep statistics of batches are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedpeft.adapters.kinds.kind import Kind
from fedpeft.errors import AdapterError, nearest

if TYPE_CHECKING:
    from torch import nn


def norms(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Return the full names of the norms to train.

    Raises
    ------
    AdapterError
        The model has none, or none of a name that is given.
    """
    found = [name for name, module in model.named_modules() if _is_norm(module)]
    if not found:
        raise AdapterError("adapter.kind = 'ln_tuning' trains norms, and this model has none.")
    if targets is None or tuple(targets) == ("all-linear",):
        return found
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in found):
            leaves = sorted({name.rpartition(".")[2] for name in found})
            raise AdapterError(
                f"adapter.targets: '{target}' is no norm of this model, and adapter.kind = 'ln_tuning' trains norms. "
                f"{nearest(target, leaves)}"
            )
    return [name for name in found if any(name == end or name.endswith(f".{end}") for end in targets)]


def _is_norm(module: nn.Module) -> bool:
    named = type(module).__name__.lower().endswith("norm") and not list(module.children())
    weight = getattr(module, "weight", None)
    return named and weight is not None and weight.ndim == 1 and not list(module.buffers())


LN_TUNING = Kind(
    name="ln_tuning",
    config="LNTuningConfig",
    update="linear",
    parts=("ln_tuning_",),
    rank=(),
    quantised=True,
    choose=norms,
)
