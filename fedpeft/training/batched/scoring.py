"""Scores of several adapters side by side: every batch of test rows once, with a copy of its rows for each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from fedpeft import tasks
from fedpeft.adapters.state import Role
from fedpeft.config import RunConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.tasks.losses import batch_losses, logits_of
from fedpeft.tasks.metrics import Scores, measures_of
from fedpeft.training.batched.layers import Forward, head_forward, is_linear, lora_forward, running, stacked
from fedpeft.training.evaluation import batches_within


def side_by_side(model: PeftModel, adapters: Sequence[str]) -> list[tuple[nn.Module, Forward]] | None:
    """Return the layers of a model that differ between adapters, and what runs all of these at once.

    Parameters
    ----------
    model : peft.PeftModel
        Holds the adapters; the first of them is active.
    adapters : sequence of str
        Their names.

    Returns
    -------
    list of tuple of nn.Module and callable, or None
        None where something that differs is no plain linear layer.
    """
    if model.active_peft_config.is_prompt_learning:
        return None  # each has virtual tokens of its own, which no layer of the base tells of
    found: list[tuple[nn.Module, Forward]] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            if (forward := _of_lora(module, adapters)) is None:
                return None
            found.append((cast(nn.Module, module), forward))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            if not isinstance(module, ModulesToSaveWrapper) or (own := _of_head(module, adapters)) is None:
                return None
            found += own
    return found


def _of_lora(module: BaseTunerLayer, adapters: Sequence[str]) -> Forward | None:
    layer = cast(Any, module)
    if not is_linear(module) or layer.lora_variant:
        return None
    if any(name not in layer.lora_A or layer.lora_B[name].bias is not None for name in adapters):
        return None
    A, B = ([factors[name].weight.detach() for name in adapters] for factors in (layer.lora_A, layer.lora_B))
    scaling = torch.tensor([layer.scaling[name] for name in adapters], device=A[0].device)
    return lora_forward(layer, stacked(A, A[0], Role.A), stacked(B, B[0], Role.B), scaling)


def _of_head(module: ModulesToSaveWrapper, adapters: Sequence[str]) -> list[tuple[nn.Module, Forward]] | None:
    copies = [dict(module.modules_to_save[name].named_modules()) for name in adapters]
    found: list[tuple[nn.Module, Forward]] = []
    for path, first in copies[0].items():
        if not any(True for _ in first.parameters(recurse=False)):
            continue
        if type(first) is not nn.Linear:
            return None
        layers = [cast(nn.Linear, each[path]) for each in copies]
        own = [torch.stack([layer.weight.detach() for layer in layers])]
        if first.bias is not None:
            own.append(torch.stack([layer.bias.detach() for layer in layers]))
        found.append((first, head_forward(*own)))
    return found


@torch.no_grad()
def score_side_by_side(
    model: PeftModel,
    layers: Sequence[tuple[nn.Module, Forward]],
    count: int,
    split: EncodedSplit,
    config: RunConfig,
) -> list[Scores]:
    """Score `count` adapters in one pass over a split; within rounding as `fedpeft.training.evaluation.score` does.

    Parameters
    ----------
    model : peft.PeftModel
        Holds them.
    layers : sequence of tuple of nn.Module and callable
        What `side_by_side` returned.
    count : int
        How many adapters.
    split : EncodedSplit
        The rows.
    config : RunConfig
        Gives the task, the precision and the size of batches, which all adapters' copies of rows make up together.
    """
    model.eval()
    task, total = tasks.of(config), len(split)
    size, most = config.run.evaluate_batch_size // count, config.run.evaluate_tokens // count
    batches = batches_within(split, size, most)
    loss, tokens = np.zeros((count, total)), np.ones((count, total))
    predicted: list[NDArray[np.generic]] = []
    right: list[NDArray[np.generic]] = []
    with running(layers):
        for rows in batches:
            batch = split.batch(rows)
            many = {name: _repeated(value, count) for name, value in batch.items()}
            if task.predict is None:
                sums, counts = batch_losses(task, model, many, config.train.precision)
            else:
                logits = logits_of(model, many, config.train.precision)
                sums, counts = task.losses(logits, many["labels"].to(logits.device))
                predicted.append(task.predict(logits).view(count, -1).cpu().numpy())
                right.append(batch["labels"].numpy())
            loss[:, rows], tokens[:, rows] = (each.view(count, -1).cpu().numpy() for each in (sums, counts))
    measures = measures_of(task)
    if not predicted:
        return [Scores(*each, measures) for each in zip(loss, tokens, strict=True)]
    back = np.argsort(np.concatenate(batches))
    said, labels = np.concatenate(predicted, axis=1)[:, back], np.concatenate(right)[back]
    return [Scores(loss[index], tokens[index], measures, said[index], labels) for index in range(count)]


def _repeated(value: Tensor, count: int) -> Tensor:
    """Return the rows `count` times behind each other."""
    return value.repeat(count, *[1] * (value.ndim - 1))
