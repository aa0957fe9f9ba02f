"""How an adapter begins: PEFT's initialisations, and the two that look at public rows first.

EVA starts A at the principal directions of each layer's inputs. LoRA-GA starts A and B at singular vectors of the
gradient, and takes their product out of the base. PEFT silently draws the default where its data was not given: here
that is an error. LoRA-SB, which PEFT does not have, starts at the first step along the gradient, and keeps it.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from fedpeft.adapters import lora_sb
from fedpeft.adapters.kinds import INITS_FROM_DATA, R_KINDS
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError
from fedpeft.models import BaseModel
from fedpeft.seeds import generator
from fedpeft.tasks.encoding import encode_rows
from fedpeft.training.optimizers import OPTIMIZERS

BATCHES = 8  # of train.batch_size public rows
PASSES = 32  # over them, for EVA's directions to settle

Batch = Mapping[str, Tensor]


def adapt(base: BaseModel, settings: PeftConfig, config: RunConfig) -> PeftModel:
    """Put an adapter into a base, initialised as the configuration says.

    Called with the run's seed and one thread: server and clients do this each for itself, and must get the same bytes.

    Parameters
    ----------
    base : BaseModel
        Changed in place; so are its weights, by PiSSA, OLoRA and LoRA-GA.
    settings : PeftConfig
        PEFT's configuration.
    config : RunConfig
        Names kind, initialisation and public rows.
    """
    adapter = config.adapter
    batches = public_batches(base, config) if adapter.init in INITS_FROM_DATA else ()
    if adapter.init == "lora-ga":
        _note_gradients(base, cast(LoraConfig, settings), batches)
    steps = _first_steps(base, settings, config, batches) if adapter.kind == "lora-sb" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora with eva init|fan_in_fan_out is set to False")  # PEFT sets it itself
        model = cast(PeftModel, get_peft_model(cast(Any, base.model), settings))
    if adapter.init == "eva":
        _to_principal_directions(model, batches)
    if adapter.kind in R_KINDS:
        lora_sb.install(model, config.run.seed, steps)
    return model


def public_batches(base: BaseModel, config: RunConfig) -> list[Batch]:
    """Return a few batches of the public rows of ``adapter.init_data``, drawn from the run's seed."""
    assert config.adapter.init_data is not None, "the configuration insists on it"
    names = () if config.task == "causal-lm" else tuple(cast(Any, base.model).config.id2label.values())
    split = encode_rows(config, base.folder, config.adapter.init_data, names)
    order, size = generator(config.run.seed, "init").permutation(len(split)), config.train.batch_size
    on = next(base.model.parameters()).device
    return [
        {name: value.to(on) for name, value in split.batch(order[start : start + size]).items()}
        for start in range(0, min(len(split), BATCHES * size), size)
    ]


def _note_gradients(base: BaseModel, settings: LoraConfig, batches: Sequence[Batch]) -> None:
    """Leave each target's gradient where PEFT looks for it while it makes the layer."""

    def step() -> None:
        for batch in batches:
            base.model(**batch).loss.backward()

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Full backward hook is firing"
        )  # as it should: nobody needs inputs' gradients
        preprocess_loraga(base.model, settings, step)
    for name in settings.target_modules or ():
        if not hasattr(base.model.get_submodule(name), "_peft_loraga_grad"):
            raise AdapterError(
                f"adapter.init = 'lora-ga': layer '{name}' got no gradient; leave it out of adapter.targets."
            )


def _first_steps(
    base: BaseModel, settings: PeftConfig, config: RunConfig, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Return the first step that training all of each target's weight on public rows would make, by its name."""
    from transformers.pytorch_utils import Conv1D

    names = list(getattr(settings, "target_modules", None) or ())
    modules = {name: base.model.get_submodule(name) for name in names}
    weights = [cast(nn.Parameter, module.weight) for module in modules.values()]
    sums = [torch.zeros_like(weight, dtype=torch.float64, device="cpu") for weight in weights]
    with _trainable(weights):
        for batch in batches:
            rows = next(iter(batch.values())).shape[0]
            gradients = torch.autograd.grad(base.model(**batch).loss, weights, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient.to("cpu", torch.float64), alpha=rows)
    steps = {}
    for (name, module), total in zip(modules.items(), sums, strict=True):
        if not total.isfinite().all() or not total.any():
            raise AdapterError(
                f"adapter.init = 'lora-sb-gradient': layer '{name}' got no finite gradient from adapter.init_data = "
                f"'{config.adapter.init_data}'; leave it out of adapter.targets, or give other rows."
            )
        G = total / sum(next(iter(batch.values())).shape[0] for batch in batches)
        first_step = OPTIMIZERS.find(config.train.optimizer).first_step
        steps[name] = first_step(G.T if isinstance(module, Conv1D) else G, config.train.learning_rate)
    return steps


@contextlib.contextmanager
def _trainable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let frozen weights have gradients inside the block."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


class _Bounded:
    """The batches again and again, for PEFT's loop that ends only when all directions have settled."""

    def __init__(self, batches: Sequence[Batch]) -> None:
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


def _to_principal_directions(model: PeftModel, batches: Sequence[Batch]) -> None:
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    drawn = [cast(Any, layer).lora_A["default"].weight.clone() for layer in layers]
    with contextlib.redirect_stdout(io.StringIO()):  # PEFT prints of batches with fewer tokens than ranks
        initialize_lora_eva_weights(
            model,
            _Bounded(batches),
            prepare_model_inputs_fn=_marks,
            prepare_layer_inputs_fn=_marked,
            show_progress_bar=False,
        )
    for layer, before in zip(layers, drawn, strict=True):
        after = cast(Any, layer).lora_A["default"].weight
        if after.shape != before.shape or torch.equal(after, before):
            raise AdapterError("adapter.init = 'eva' left a layer as drawn; take another adapter.init.")


def _marks(inputs: Batch, settings: PeftConfig) -> Tensor | None:
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
