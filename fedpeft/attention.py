"""Which attention a base is run with: a fixed rule of precision and device, so that no timing decides on bytes.

float32, and any GPU: transformers' default, which is torch's fused attention where the architecture has it. bf16 on a
CPU: the fused attention's backward is slower there than the plain one (five times, on a processor with AMX), so the
plain one is taken, with the scale put on the query, which is smaller than the scores.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

PLAIN, EAGER = "fedpeft_plain", "eager"


def attention_for(model: type | None, config: Any, bf16: bool, device: torch.device) -> str | None:
    """Return what to ask transformers for; None for its default.

    Parameters
    ----------
    model : type, optional
        The architecture's class, where it is known.
    config : transformers.PretrainedConfig
        Of the base.
    bf16 : bool
        Whether the base is in bf16.
    device : torch.device
        Where it will be.
    """
    if not bf16 or device.type != "cpu":
        return None
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    if not getattr(model, "_supports_attention_backend", False) or any(part is not None for part in parts):
        return EAGER
    _register()
    return PLAIN


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if PLAIN not in AttentionInterface._global_mapping:
        AttentionInterface.register(PLAIN, plain_attention)
        AttentionMaskInterface.register(PLAIN, eager_mask)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend by two batched products and a softmax.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer.
    query : Tensor
        ``(b, h, t, d)``.
    key, value : Tensor
        ``(b, g, s, d)``, where h is a multiple of g.
    attention_mask : Tensor, optional
        What is added to the scores, ``(b, 1, t, s)``; None where every token sees all others.
    scaling : float, optional
        Of the scores; one over the root of d if not given.
    dropout : float
        Of the weights.
    **settings : object
        What an architecture asks of attention besides; with any of it, its own plain attention is run.

    Returns
    -------
    tuple of Tensor
        ``(b, t, h, d)``, and no weights.
    """
    extra = any(settings.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if extra and own is not None:
        found: tuple[Tensor, Tensor | None] = own(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **settings
        )
        return found
    h, d = query.shape[1], query.shape[3]
    if key.shape[1] != h:
        key, value = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (key, value))
    scaled = query * (d**-0.5 if scaling is None else scaling)
    scores = torch.matmul(scaled, key.transpose(2, 3))  # (b, h, t, s)
    if attention_mask is not None:
        scores = scores.add_(attention_mask)
    weights = torch.softmax(scores, -1)
    if dropout and module.training:
        weights = nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None
