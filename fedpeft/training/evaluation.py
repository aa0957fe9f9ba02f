"""Scores on the test split: computed row by row once, then summed over whichever rows are asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.data.partition import Partition
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import ConfigError
from fedpeft.tasks.losses import logits_of
from fedpeft.tasks.metrics import Scores, find, measures_of
from fedpeft.training.prefix import feeding


def score(model: nn.Module, split: EncodedSplit, config: RunConfig) -> Scores:
    """Run a model over a split.

    Rows are taken in the order of their length, so that batches need little padding.

    Parameters
    ----------
    model : torch.nn.Module
        The base with its adapter.
    split : EncodedSplit
        The rows.
    config : RunConfig
        Gives the task, the batch size and the precision.
    """
    with torch.no_grad(), feeding(model, config):
        return _score(model, split, config)


def _score(model: nn.Module, split: EncodedSplit, config: RunConfig) -> Scores:
    model.eval()
    task = tasks.of(config)
    count, size = len(split), config.run.evaluate_batch_size
    order = np.argsort(np.asarray(split.lengths), kind="stable")
    loss, tokens = np.zeros(count), np.ones(count)
    predicted: list[NDArray[np.generic]] = []
    right: list[NDArray[np.generic]] = []
    for start in range(0, count, size):
        rows = order[start : start + size]
        batch = split.batch(rows)
        logits = logits_of(model, batch, config.train.precision)
        targets = batch["labels"].to(logits.device)
        loss[rows], tokens[rows] = (values.cpu().numpy() for values in task.losses(logits, targets))
        if task.predict is not None:
            predicted.append(task.predict(logits).cpu().numpy())
            right.append(batch["labels"].numpy())
    measures = measures_of(task)
    if not predicted:
        return Scores(loss, tokens, measures)
    back = np.argsort(order)
    return Scores(loss, tokens, measures, np.concatenate(predicted)[back], np.concatenate(right)[back])


def client_metrics(
    scores: Scores,
    test: EncodedSplit,
    train: EncodedSplit,
    held: Partition,
    clients: Collection[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Score a model for each client on its own rows, of the test rows alone and of scores that are there already.

    Where test rows name their client, a client's score is that of its rows. Elsewhere each test row counts as often as
    the client's own training rows are of its kind, a kind being a label, a domain, or both; kinds that the test split
    lacks are left out, and so are metrics that are no ratio of sums over rows.

    Parameters
    ----------
    scores : Scores
        The model's, of all test rows.
    test, train : EncodedSplit
        The rows.
    held : Partition
        Who holds which training rows.
    clients : collection of str, optional
        Only these; all if not given.

    Raises
    ------
    ConfigError
        Rows have neither client, label nor domain.
    """
    if test.clients is not None:
        return scores.by_group(test.clients, clients)
    kinds = [_kinds(split) for split in (train, test)]
    names, index = np.unique(np.concatenate(kinds), return_inverse=True)
    of_train, of_test = index[: len(train)], index[len(train) :]
    present = np.bincount(of_test, minlength=len(names))

    def per_kind(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(of_test, values, len(names)) / np.maximum(present, 1)

    ratios = {
        metric: [per_kind(values) for values in metric.ratio(scores)] for metric in scores.measures if metric.ratio
    }
    found = {}
    for client, rows in zip(held.client_ids, held.indices, strict=True):
        if clients is not None and client not in clients:
            continue
        weight = np.where(present > 0, np.bincount(of_train[rows], minlength=len(names)), 0).astype(np.float64)
        if not weight.any():
            continue
        found[client] = {
            metric.name: metric.finish(float((weight * above).sum() / (weight * below).sum()))
            for metric, (above, below) in ratios.items()
        }
    return found


def _kinds(split: EncodedSplit) -> NDArray[np.str_]:
    columns = [[str(label) for label in split.labels.tolist()]] if split.labels is not None else []
    columns += [list(split.domains)] if split.domains is not None else []
    if not columns:
        raise ConfigError(
            "run.evaluate_clients needs test rows that name their client (partition.by), a label, or data.domain; "
            "these rows have none of them."
        )
    return np.asarray(["\x1f".join(parts) for parts in zip(*columns, strict=True)])


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each metric over models."""
    return {name: float(np.mean([each[name] for each in metrics])) for name in metrics[0]}


def mean_and_worst(values: dict[str, dict[str, float]], key: str) -> dict[str, float]:
    """Summarise one metric over groups: its mean, and the mean of the worst tenth (at least one group)."""
    ordered = np.sort([metrics[key] for metrics in values.values()])
    if find(key).better == "lower":
        ordered = ordered[::-1]
    worst = ordered[: max(1, math.ceil(len(ordered) / 10))]
    return {"mean": float(ordered.mean()), "worst_tenth": float(worst.mean())}
