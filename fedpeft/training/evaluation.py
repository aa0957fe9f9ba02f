"""Scores on the test split: computed row by row once, then summed over whichever rows are asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.data.partition import Partition
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import ConfigError
from fedpeft.tasks.losses import batch_losses, logits_of
from fedpeft.tasks.metrics import Metric, Scores, find, measures_of
from fedpeft.training.prefix import feeding


@dataclass(frozen=True)
class RowScores:
    """A model's scores on some rows of a split.

    Parameters
    ----------
    rows : array of int64, shape (m,)
        Which rows.
    loss, tokens : array of float64, shape (m,)
        See `fedpeft.tasks.metrics.Scores`, as for the others.
    predicted, labels : array, shape (m,), or None
        What the model says and what is right.
    """

    rows: NDArray[np.int64]
    loss: NDArray[np.float64]
    tokens: NDArray[np.float64]
    predicted: NDArray[np.generic] | None = None
    labels: NDArray[np.generic] | None = None


def score(model: nn.Module, split: EncodedSplit, config: RunConfig) -> Scores:
    """Run a model over a split.

    Parameters
    ----------
    model : torch.nn.Module
        The base with its adapter.
    split : EncodedSplit
        The rows.
    config : RunConfig
        Gives the task, the batch size and the precision.
    """
    return together(score_batches(model, split, config, batches_of(split, config)), len(split), config)


def batches_of(split: EncodedSplit, config: RunConfig) -> list[NDArray[np.int64]]:
    """Return the rows of each batch: in the order of their length, so that batches need little padding.

    Both limits, of rows and of tokens, bound a batch.
    """
    return batches_within(split, config.run.evaluate_batch_size, config.run.evaluate_tokens)


def batches_within(split: EncodedSplit, size: int, tokens: int) -> list[NDArray[np.int64]]:
    """Return the rows of each batch of at most so many rows, and so many tokens with padding; one row at least."""
    lengths = np.asarray(split.lengths)
    order = np.argsort(lengths, kind="stable")
    found, start = [], 0
    for end in range(1, len(order) + 1):
        following = end < len(order) and end - start < size and (end - start + 1) * lengths[order[end]] <= tokens
        if not following:  # rows come by their length, so that the next one would be the longest
            found.append(order[start:end])
            start = end
    return found


def score_batches(
    model: nn.Module, split: EncodedSplit, config: RunConfig, batches: Iterable[NDArray[np.int64]]
) -> list[RowScores]:
    """Run a model over some batches of a split, each by itself: what a row is given depends on its batch alone."""
    with torch.no_grad(), feeding(model, config):
        return _score_batches(model, split, config, batches)


def _score_batches(
    model: nn.Module, split: EncodedSplit, config: RunConfig, batches: Iterable[NDArray[np.int64]]
) -> list[RowScores]:
    model.eval()
    task = tasks.of(config)
    found = []
    for rows in batches:
        batch = split.batch(rows)
        if task.predict is None:
            found.append(RowScores(rows, *_as_numbers(batch_losses(task, model, batch, config.train.precision))))
        else:
            logits = logits_of(model, batch, config.train.precision)
            sums = _as_numbers(task.losses(logits, batch["labels"].to(logits.device)))
            predicted = task.predict(logits).cpu().numpy()
            found.append(RowScores(rows, *sums, predicted, batch["labels"].numpy()))
    return found


def _as_numbers(values: tuple[torch.Tensor, torch.Tensor]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    loss, tokens = (value.cpu().numpy().astype(np.float64) for value in values)
    return loss, tokens


def together(parts: Sequence[RowScores], count: int, config: RunConfig) -> Scores:
    """Return the scores of all `count` rows of a split, in their order, from those of its parts."""
    rows = np.concatenate([part.rows for part in parts]) if parts else np.zeros(0, np.int64)
    back = np.argsort(rows)
    loss, tokens = np.zeros(count), np.ones(count)
    predicted, labels = [], []
    for part in parts:
        loss[part.rows], tokens[part.rows] = part.loss, part.tokens
        if part.predicted is not None and part.labels is not None:
            predicted.append(part.predicted)
            labels.append(part.labels)
    measures = measures_of(tasks.of(config))
    if not predicted:
        return Scores(loss, tokens, measures)
    return Scores(loss, tokens, measures, np.concatenate(predicted)[back], np.concatenate(labels)[back])


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
        metric: [per_kind(values) for values in _of_all_rows(metric, scores)]
        for metric in scores.measures
        if metric.ratio is not None
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
            if (weight * below).any()
        }
    return found


def _of_all_rows(metric: Metric, scores: Scores) -> Sequence[NDArray[np.float64]]:
    """Return a ratio's numerators and denominators, zero in rows that were not answered, where it is of answers."""
    assert metric.ratio is not None
    above, below = metric.ratio(scores)
    if metric.judge is None:
        return above, below
    return np.nan_to_num(above), np.where(np.isnan(above), 0.0, below)


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
