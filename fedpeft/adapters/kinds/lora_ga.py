"""LoRA-GA: A and B begin at singular vectors of the gradient, and their product is taken out of the base.

S. Wang et al., arXiv 2407.05000. PEFT silently draws the default where it got no gradient: here that is an error.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

from fedpeft.adapters.kinds.kind import Init, Start
from fedpeft.errors import AdapterError


def _configs() -> dict[str, Any]:
    import peft

    return {"lora_ga_config": peft.LoraGAConfig()}


def note_gradients(start: Start) -> None:
    """Leave each target's gradient where PEFT looks for it while it makes the layer."""
    from peft.tuners.lora.loraga import preprocess_loraga

    model = cast(Any, start.model)

    def step() -> None:
        for batch in start.batches:
            start.loss(batch).backward()  # type: ignore[no-untyped-call]

    with warnings.catch_warnings():
        # as it should: nobody needs inputs' gradients
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        preprocess_loraga(model, cast(Any, start.settings), step)
    for name in cast(Any, start.settings).target_modules or ():
        if not hasattr(model.get_submodule(name), "_peft_loraga_grad"):
            raise AdapterError(
                f"adapter.init = 'lora-ga': layer '{name}' got no gradient; leave it out of adapter.targets."
            )


LORA_GA = Init(
    name="lora-ga",
    value="lora_ga",
    configs=_configs,
    from_data=True,
    of_base=True,
    of_gradients=True,
    ranks=2,
    simulations_only="every site would take directions of its own gradient out of the base, and their signs depend on "
    "the processor. Use 'pissa' or 'default'.",
    prepare=note_gradients,
)
