"""Super-Tuning: the largest entries of the weight are trained, all others stay (arXiv 2607.09287, as PEFT names it).

W = W0 + S, where S has (1 - ``adapter.sparsity``) of the entries, at the places of largest magnitude in W0; linear in
what is trained. The places follow from the base and are saved with the adapter. The paper's hybrid with LoRA is not
linear and left out here: use lora for that.
"""

from __future__ import annotations

from typing import Any

from fedpeft.adapters.kinds.kind import Kind


def misfit(settings: Any, d_out: int, d_in: int) -> str:
    """Tell whether anything of a layer is left to be trained."""
    if int(d_out * d_in * (1 - settings.sparsity)) >= 1:
        return ""
    return (
        f"adapter.sparsity = {settings.sparsity:g} leaves nothing of its {d_out * d_in} weights to train; set it lower"
    )


SUPERTUNING = Kind(
    name="supertuning",
    config="SupertuningConfig",
    update="linear",
    parts=("supertuning_",),
    rank=(),
    settings={"r": None, "lora_alpha": None, "lora_dropout": 0.0, "save_precomputed_indices": True},
    conv1d=False,
    reads_base=True,
    misfit=misfit,
)
