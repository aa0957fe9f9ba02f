"""Whether a base, and its tokenizer or image processor, agree: seen on a few rows of nobody's, before training.

What configurations can tell is compared by `fedpeft.bases`. Here the model itself is asked: its scores must be there,
finite, and the same whatever stands beside a row; and a language model must not see the tokens that it is to predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor

from fedpeft import tasks
from fedpeft.bases import first_line, padding_of_positions
from fedpeft.config import RunConfig
from fedpeft.data.pixels import load_processor, preprocess
from fedpeft.data.readers import Place
from fedpeft.data.splits import EncodedSplit
from fedpeft.data.tokens import load_tokenizer
from fedpeft.errors import ModelError
from fedpeft.models import BaseModel, torch_seed
from fedpeft.tasks.classes import inputs_of
from fedpeft.tasks.losses import logits_of
from fedpeft.tasks.task import Task

# share of the largest score by which two computations of the same may differ
TOLERANCE = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.02}
LONG, SHORT = 12, 3  # tokens of the rows, about


def agree(base: BaseModel, config: RunConfig, pixels: tuple[int, ...] | None = None) -> None:
    """Check that a base reads what its tokenizer or image processor makes, and give it the tokenizer's padding.

    Parameters
    ----------
    base : BaseModel
        As loaded, without an adapter.
    config : RunConfig
        Names task, columns, lengths and precision.
    pixels : tuple of int, optional
        Shape ``(C, H, W)`` of the run's images; that of an image of noise, as the processor makes it, if not given.

    Raises
    ------
    ModelError
        They do not agree.
    """
    task = tasks.of(config)
    if task.reads_images:
        rows = _images(base, config, pixels)
        what = f"its images of shape {tuple(rows.tensors['pixels'].shape[1:])}"
    else:
        _agree_on_padding(base, config, task)
        rows = _texts(base, config, task)
        what = "what its tokenizer makes"
    with torch_seed(0), torch.no_grad():
        _probe(base, config, task, rows, what)


def _agree_on_padding(base: BaseModel, config: RunConfig, task: Task) -> None:
    """Let a classifier look for the last token that is not the tokenizer's padding.

    Where positions are counted from the padding token's id, a change of it would be another model.
    """
    tokenizer, pad = load_tokenizer(config, base.folder)
    counted_from = padding_of_positions(base.model)
    if counted_from is not None and counted_from != pad:
        raise ModelError(
            f"the tokenizer in '{base.folder}' pads with token {pad} ({tokenizer.convert_ids_to_tokens(pad)!r}), but "
            f"the model counts its positions from padding token {counted_from}. Save the tokenizer that belongs to it."
        )
    if task.reads_last_token:
        cast(Any, base.model).config.get_text_config().pad_token_id = pad


def _texts(base: BaseModel, config: RunConfig, task: Task) -> EncodedSplit:
    """Return a long row, a short one, and a short one with the padding token inside, of the tokenizer's own words."""
    tokenizer, pad = load_tokenizer(config, base.folder)
    special = {*tokenizer.all_special_ids, pad}
    ids = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    chosen = [ids[at] for at in np.linspace(0, len(ids) - 1, LONG).astype(int)] if ids else [pad]
    long, short = (tokenizer.decode(part) for part in (chosen, chosen[-SHORT:]))
    texts = [long, short, f"{short}{tokenizer.convert_ids_to_tokens(pad)}{short}"]
    named = [each.name for each in task.columns if each.kind == "text" and each.named(config.data) is not None]
    columns: dict[str, list[Any]] = dict.fromkeys(named, [short] * 3) | {named[0]: texts}
    table = datasets.Dataset.from_dict({"row": list(range(3)), **columns})
    place = Place("the rows of a first check", "json", None)
    encoding = task.encode(config, base.folder, inputs_of(config, base.folder), place, table)
    return EncodedSplit(task.name, encoding.tensors, pad_token_id=encoding.pad_token_id)


def _images(base: BaseModel, config: RunConfig, shape: tuple[int, ...] | None) -> EncodedSplit:
    draw = np.random.default_rng(0)
    if shape is None:
        import PIL.Image

        processor, mode = load_processor(config, base.folder, inputs_of(config, base.folder).channels)
        size = (32, 32, 3)
        image = PIL.Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).convert(mode)
        shape = tuple(preprocess(processor, [image], raw=False).shape[1:])
    pixels = torch.from_numpy(draw.standard_normal((3, *shape), dtype=np.float32))
    return EncodedSplit(tasks.named(config), {"pixels": pixels})


def _probe(base: BaseModel, config: RunConfig, task: Task, rows: EncodedSplit, what: str) -> None:
    model, folder = cast(Any, base.model), base.folder

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return logits_of(base.model, inputs, config.train.precision).float().cpu()

    try:
        scores = run(rows.batch(range(3)))
        alone = [run(rows.batch([row]))[0] for row in (1, 2)]
    except Exception as error:  # whatever code of a model raises, it cannot train on such rows
        raise ModelError(
            f"'{folder}' ({type(base.model).__name__}) cannot read {what}: {first_line(error).rstrip('.')}."
            f"{_advice(model, task, error, rows)}"
        ) from error
    labels = int(model.config.num_labels)
    if not task.per_token and scores.shape != (3, labels):
        raise ModelError(
            f"'{folder}' ({type(base.model).__name__}) gives scores of shape {tuple(scores.shape)} for 3 rows and "
            f"{labels} labels; it is no classifier. Take another base."
        )
    if not scores.isfinite().all():
        raise ModelError(
            f"'{folder}' gives scores that are not finite numbers. Its weights are damaged, or too large for "
            f"train.precision = '{config.train.precision}'."
        )
    tolerance = TOLERANCE[config.train.precision]
    held = rows.lengths if task.per_token else [labels] * 3  # of a row's scores, how many are its own

    def differ(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() > tolerance * scores.abs().max())

    if any(differ(scores[row][: held[row]], each[: held[row]]) for row, each in zip((1, 2), alone, strict=True)):
        raise ModelError(
            f"'{folder}' ({type(base.model).__name__}) gives a row other scores beside longer rows than alone: it does "
            "not leave padding out, so that results would depend on the size of batches. Take another base."
        )
    if task.continues and int(held[0]) > 1:
        later = {name: value[:1].clone() for name, value in rows.batch([0]).items()}
        later["input_ids"][0, -1] = (later["input_ids"][0, -1] + 1) % model.config.get_text_config().vocab_size
        if differ(run(later)[0][:-1], scores[0][: held[0] - 1]):
            raise ModelError(
                f"'{folder}' ({type(base.model).__name__}) is no causal language model: its scores of a token depend "
                "on those after it. Take a model that was made to continue texts, such as GPT-2 or Llama."
            )


def _advice(model: Any, task: Task, error: Exception, rows: EncodedSplit) -> str:
    """Say what the model was made for."""
    held = model.config
    if isinstance(error, IndexError):
        return f" It has {held.get_text_config().vocab_size} embeddings: save the tokenizer that belongs to it."
    size = getattr(held, "image_size", getattr(getattr(held, "vision_config", None), "image_size", None))
    if task.reads_images and size is not None and not _is_size(size, rows):
        return f" It was made for image_size = {size}: set size and crop in preprocessor_config.json to that."
    return " Take another base."


def _is_size(size: Any, rows: EncodedSplit) -> bool:
    height, width = rows.tensors["pixels"].shape[-2:]
    return (height, width) == (tuple(size) if isinstance(size, list | tuple) else (size, size))
