"""How an adapter is put into a base, and begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor

from fedpeft import tasks
from fedpeft.adapters.kinds import Kind, Start
from fedpeft.adapters.targets import linear_modules
from fedpeft.config import RunConfig, TrainConfig
from fedpeft.errors import AdapterError
from fedpeft.models import BaseModel
from fedpeft.seeds import derive_seed, generator
from fedpeft.tasks.classes import inputs_of, max_length
from fedpeft.tasks.encoding import encode_rows
from fedpeft.tasks.losses import mean_loss
from fedpeft.training.optimizers import OPTIMIZERS

BATCHES = 8  # of train.batch_size public rows

Batch = Mapping[str, Tensor]


def adapt(base: BaseModel, config: RunConfig, common: Mapping[str, Any]) -> tuple[PeftConfig, PeftModel]:
    """Put an adapter into a base, initialised as the configuration says.

    Called with the run's seed and one thread: server and clients do this each for itself, and must get the same bytes.

    Parameters
    ----------
    base : BaseModel
        Changed in place; so are its weights, by initialisations that take a part out of them.
    config : RunConfig
        Names kind, initialisation and public rows.
    common : mapping
        What every configuration of PEFT takes, such as ``target_modules``.

    Returns
    -------
    settings : PeftConfig
        PEFT's configuration.
    model : PeftModel
        The adapted base.

    Raises
    ------
    AdapterError
        PEFT refuses the options of this kind, or this base.
    """
    adapter, train, seed = config.adapter, config.train, config.run.seed
    kind, init = adapter.facts, adapter.beginning
    batches = public_batches(base, config) if init.from_data else []
    try:
        settings = kind.peft_config(
            init,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            projection_seed=derive_seed(seed, "adapter"),
            options=_options(base, config, common),
            common=common,
        )
        _check_shapes(base, kind, settings, common)
        if kind.prompts:
            _check_prompts(base, config, settings)
        loss = partial(mean_loss, tasks.of(config), base.model)
        rows = str(adapter.init_data)
        start = Start(base.model, settings, loss, batches, rows, seed, _first_step(train))
        prepared = None if init.prepare is None else init.prepare(start)
        with warnings.catch_warnings():
            # PEFT sets the second itself; the third is told as a note
            said = "lora with eva init|fan_in_fan_out is set to False|Model has `tie_word_embeddings=True`"
            warnings.filterwarnings("ignore", said)
            model = cast(PeftModel, get_peft_model(cast(Any, base.model), settings))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"adapter.kind = '{kind.name}': PEFT cannot make it here: {error}") from error
    if init.finish is not None:
        init.finish(model, start)
    if kind.install is not None:
        kind.install(model, start, prepared)
    return settings, model


def _first_step(train: TrainConfig) -> Callable[[Tensor], Tensor]:
    first_step = OPTIMIZERS.find(train.optimizer).first_step
    return lambda gradient: first_step(gradient, train.learning_rate)


def _options(base: BaseModel, config: RunConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of PEFT's configuration, as users give them and as they follow from the layers."""
    options: dict[str, Any] = dict(config.adapter.options)
    if (fit := config.adapter.facts.fit) is not None:
        options |= fit(base.model, common.get("target_modules", ()), options)
    return options


def _check_shapes(base: BaseModel, kind: Kind, settings: PeftConfig, common: Mapping[str, Any]) -> None:
    """Raise AdapterError for a layer whose shape the kind's options do not suit."""
    if kind.misfit is None:
        return
    shapes = linear_modules(base)
    for name in common["target_modules"]:
        if problem := kind.misfit(settings, *shapes[name]):
            raise AdapterError(
                f"adapter.kind = '{kind.name}' does not fit layer '{name}' of shape {shapes[name]}: {problem}."
            )


def _check_prompts(base: BaseModel, config: RunConfig, settings: Any) -> None:
    """Raise AdapterError where virtual tokens have no text to stand before, or no positions."""
    kind = f"adapter.kind = '{config.adapter.kind}'"
    if settings.task_type is None:
        raise AdapterError(
            f"{kind} puts virtual tokens before those of a text, and model.task = '{tasks.of(config).name}' has no "
            "texts; use another adapter.kind, such as lora."
        )
    limit, tokens = inputs_of(config, base.folder).tokens, settings.num_virtual_tokens
    length = max_length(config, base.folder)
    if tokens < 1:
        raise AdapterError(f"adapter.num_virtual_tokens = {tokens}: {kind} needs at least 1.")
    if limit is not None and tokens + length > limit:
        raise AdapterError(
            f"adapter.num_virtual_tokens = {tokens} and data.max_length = {length} are more than the {limit} tokens "
            f"that the model reads; set data.max_length to {max(limit - tokens, 1)} or less."
        )


def public_batches(base: BaseModel, config: RunConfig) -> list[Batch]:
    """Return a few batches of the public rows of ``adapter.init_data``, drawn from the run's seed."""
    assert config.adapter.init_data is not None, "the configuration insists on it"
    names = tuple(cast(Any, base.model).config.id2label.values()) if tasks.of(config).has_labels else ()
    split = encode_rows(config, base.folder, config.adapter.init_data, names)
    order, size = generator(config.run.seed, "init").permutation(len(split)), config.train.batch_size
    on = next(base.model.parameters()).device
    return [
        {name: value.to(on) for name, value in split.batch(order[start : start + size]).items()}
        for start in range(0, min(len(split), BATCHES * size), size)
    ]
