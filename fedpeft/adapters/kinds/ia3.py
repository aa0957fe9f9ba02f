"""(IA)^3: a trained factor of each output of a layer, or of each input of a feed-forward's second layer.

(H. Liu et al., arXiv 2205.05638.) y = l * (W0 x + b), or W0 (l * x) + b; linear in l. The paper scales keys, values and
the inner activations of feed-forwards; here ``adapter.targets`` says what is scaled, query and value if unset. Of the
targets, those are scaled on their inputs that PEFT knows as feed-forwards of this model, or that
``adapter.feedforward_modules`` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft.adapters.kinds.kind import Kind
from fedpeft.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn


def fit(model: nn.Module, targets: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return which of the targets are second layers of feed-forwards."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(model, "config", None), "model_type", "")
    named = options.get("feedforward_modules", KNOWN.get(kind, []))
    endings = [named] if isinstance(named, str) else list(named)
    found = [name for name in targets if any(name == end or name.endswith(f".{end}") for end in endings)]
    if "feedforward_modules" in options and not found:
        raise AdapterError(
            f"adapter.feedforward_modules = {', '.join(endings)} names none of adapter.targets; name some of them"
        )
    return {"feedforward_modules": found}


IA3 = Kind(name="ia3", config="IA3Config", update="linear", parts=("ia3_",), rank=(), quantised=True, fit=fit)
