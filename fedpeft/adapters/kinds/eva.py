"""EVA: A begins at the principal directions of each layer's inputs (F. Paischer et al., arXiv 2410.07170).

PEFT silently draws the default where its data was not given: here that is an error. Ranks stay as configured, the same
in every layer.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft.adapters.kinds.kind import Init, Start
from fedpeft.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

PASSES = 32  # over the public rows, for the directions to settle


class _Bounded:
    """The batches again and again, for PEFT's loop that ends only when all directions have settled."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        # PEFT reads labels as marks on tokens, which those of a classifier are not
        self._batches = [
            {name: value for name, value in batch.items() if name != "labels" or value.ndim > 1} for batch in batches
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(PASSES):
            yield from self._batches
        raise AdapterError(
            f"adapter.init = 'eva' did not settle in {PASSES} passes over {len(self)} batches of adapter.init_data; "
            "give more rows, a larger train.batch_size, or a smaller adapter.rank."
        )


def _configs() -> dict[str, Any]:
    import peft

    return {"eva_config": peft.EvaConfig(rho=1.0)}


def to_principal_directions(model: PeftModel, start: Start) -> None:
    """Set every A to the principal directions of its layer's inputs."""
    import torch
    from peft import initialize_lora_eva_weights

    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    drawn = [layer.lora_A["default"].weight.clone() for layer in layers]
    with contextlib.redirect_stdout(io.StringIO()):  # PEFT prints of batches with fewer tokens than ranks
        initialize_lora_eva_weights(
            model,
            _Bounded(start.batches),
            prepare_model_inputs_fn=_marks,
            prepare_layer_inputs_fn=_marked,
            show_progress_bar=False,
        )
    for layer, before in zip(layers, drawn, strict=True):
        after = layer.lora_A["default"].weight
        if after.shape != before.shape or torch.equal(after, before):
            raise AdapterError("adapter.init = 'eva' left a layer as drawn; take another adapter.init.")


def _marks(inputs: Mapping[str, Tensor], settings: PeftConfig) -> Tensor | None:
    """Tell which tokens count: no padding and, where labels are tokens, no prompt."""
    mask = inputs.get("attention_mask")
    if mask is not None and "labels" in inputs:
        return mask.bool() & (inputs["labels"] != -100)
    return None if mask is None else mask.bool()


def _marked(inputs: Any, marks: Tensor | None, layer: str) -> Tensor:
    values: Tensor = inputs[0] if isinstance(inputs, tuple | list) else inputs
    if marks is not None and values.shape[:-1] == marks.shape:
        return values[marks]
    return values.reshape(-1, values.shape[-1])  # patches of images, and what no longer has tokens


EVA = Init(name="eva", value="eva", configs=_configs, from_data=True, finish=to_principal_directions)
