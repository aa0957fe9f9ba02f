"""Blocks that keep their inputs alone in the forward pass, and run once more in the backward pass.

T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. Nothing of a result changes: what
dropout draws is drawn again. torch has two ways. The newer one, which runs a block again when the first thing that it
would have kept is asked for, suits everything but Opacus's hooks: these see a block's activations in the forward pass
and take them from a stack in the backward pass, and its own recomputation pushes them a second time. Under hooks the
older one is taken, in whose first pass no gradients are recorded and no hook looks; it needs an input that asks for a
gradient, which that of a frozen embedding does not by itself.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from fedpeft.errors import AdapterError

KEPT = "_fedpeft_reentrant"  # attribute of a model that is checkpointed: which of the two ways


def checkpoint_blocks(model: nn.Module, *, by_hooks: bool = False) -> None:
    """Let the blocks of a model run again in the backward pass, wherever it trains.

    Parameters
    ----------
    model : torch.nn.Module
        With or without an adapter.
    by_hooks : bool
        Whether hooks take gradients of single rows from its layers.

    Raises
    ------
    AdapterError
        The model's code cannot do that.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(inner).__name__
    try:
        if not inner.supports_gradient_checkpointing:
            raise ValueError
        inner.activation_checkpointing_enable({"use_reentrant": by_hooks})
        inner.disable_input_require_grads()
        if by_hooks:
            inner.enable_input_require_grads()
    except (AttributeError, ValueError):
        raise AdapterError(
            f"train.gradient_checkpointing = true: the code of {name} in transformers cannot run its blocks again. "
            "Set it to false, and train.batch_size or data.max_length to less."
        ) from None
    vars(model)[KEPT] = by_hooks


def suit_hooks(model: nn.Module, *, by_hooks: bool) -> None:
    """Change the way of a model that is checkpointed as hooks come or go; leave any other as it is."""
    if vars(model).get(KEPT, by_hooks) != by_hooks:
        checkpoint_blocks(model, by_hooks=by_hooks)


def checkpointed(model: nn.Module) -> bool:
    """Tell whether a model's blocks run again."""
    return KEPT in vars(model)
