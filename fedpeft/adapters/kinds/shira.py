"""SHiRA: as many single entries of the weight as LoRA has parameters (K. Bhardwaj et al., arXiv 2406.13175).

W = W0 + S, where S has r (d_in + d_out) entries at places that are drawn once; linear in what is trained. PEFT draws
the places of all layers of one shape alike, and from a constant seed. Here each layer draws its own from the run's
seed; they are saved with the adapter, as PEFT does. Of the paper's masks this is the random one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft.adapters.kinds.kind import Kind, Start
from fedpeft.seeds import generator

if TYPE_CHECKING:
    from peft import PeftModel


def misfit(settings: Any, d_out: int, d_in: int) -> str:
    """Tell whether a layer has as many entries as are to be trained."""
    most = d_out * d_in // (d_out + d_in)
    return "" if settings.r <= most else f"adapter.rank = {settings.r} trains more than all its weights; at most {most}"


def install(model: PeftModel, start: Start, prepared: object) -> None:
    """Draw the places of every layer by its name, in place."""
    import torch

    for path, module in model.named_modules():
        if "default" in (held := getattr(module, "shira_indices", {})):
            layer: Any = module
            count = held["default"].shape[1]
            d_out, d_in = layer.out_features, layer.in_features
            drawn = generator(start.seed, "shira", path).choice(d_out * d_in, count, replace=False)
            drawn.sort()
            places = torch.from_numpy(drawn)
            held["default"] = torch.stack([places // d_in, places % d_in]).to(held["default"])


SHIRA = Kind(
    name="shira",
    config="ShiraConfig",
    update="linear",
    parts=("shira_",),
    seed="random_seed",
    settings={"mask_type": "random"},
    conv1d=False,
    misfit=misfit,
    install=install,
    quantised=True,
)
