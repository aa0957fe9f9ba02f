"""DEFT: a part of the weight's outputs is projected away, and another put in its place, as PEFT has it.

W = (I - P relu(P)^T) W0 + (alpha / r) P R, with P ``(d_out, r)`` and R ``(r, d_in)`` trained; with
``adapter.decomposition_method=qr``, Q of P's QR decomposition stands for P and relu(P). It begins where both parts undo
each other; with ``adapter.para=true`` there is no R, and it begins with a part of the weight taken away. A mean of P is
not the mean of projections.
"""

from __future__ import annotations

from typing import Any

from fedpeft.adapters.kinds.kind import Kind, drawn_if_asked


def taken_away(settings: Any) -> bool:
    """Tell whether nothing is put in the place of what is projected away."""
    return bool(settings.para) or drawn_if_asked(settings)


DEFT = Kind(
    name="deft",
    config="DeftConfig",
    update="neither",
    parts=("deft_",),
    alpha="alpha",
    dropout="deft_dropout",
    reads_base=True,
    moved=taken_away,
)
