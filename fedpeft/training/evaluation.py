"""Scores on the test split: computed row by row once, then summed over whichever rows are asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.config import RunConfig
from fedpeft.data.partition import Partition
from fedpeft.errors import ConfigError
from fedpeft.tasks.encoding import EncodedSplit
from fedpeft.tasks.losses import row_losses


@dataclass(frozen=True)
class Scores:
    """One model's scores on each row of a split.

    Parameters
    ----------
    loss : array of float64, shape (n,)
        Sum of the row's negative log-likelihoods, in nats.
    tokens : array of float64, shape (n,)
        What that sum counts: completion tokens, or 1.
    predicted, labels : array of int64, shape (n,), or None
        Label ids, for classification.
    """

    loss: NDArray[np.float64]
    tokens: NDArray[np.float64]
    predicted: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None

    def metrics(self, rows: NDArray[np.bool_] | None = None) -> dict[str, float]:
        """Summarise all rows, or those of a mask.

        Returns
        -------
        dict of str to float
            ``loss``, and ``accuracy`` and ``macro_f1`` (over labels that occur or are predicted), or ``perplexity``.
        """
        from sklearn.metrics import f1_score

        chosen = slice(None) if rows is None else rows
        loss = float(self.loss[chosen].sum() / self.tokens[chosen].sum())
        if self.predicted is None or self.labels is None:
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        predicted, labels = self.predicted[chosen], self.labels[chosen]
        return {
            "loss": loss,
            "accuracy": float((predicted == labels).mean()),
            "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        }

    def by_group(self, groups: tuple[str, ...], wanted: Collection[str] | None = None) -> dict[str, dict[str, float]]:
        """Summarise the rows of each group, or of those wanted, such as a domain or a client; in sorted order."""
        names = np.asarray(groups)
        chosen = [str(name) for name in np.unique(names) if wanted is None or name in wanted]
        return {name: self.metrics(names == name) for name in chosen}


@torch.no_grad()
def score(model: nn.Module, split: EncodedSplit, config: RunConfig) -> Scores:
    """Run a model over a split.

    Rows are taken in the order of their length, so that batches need little padding.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier or causal language model with its adapter.
    split : EncodedSplit
        The rows.
    config : RunConfig
        Gives the batch size and the precision.
    """
    model.eval()
    on = next(model.parameters()).device
    count, size = len(split), config.run.evaluate_batch_size
    order = np.argsort(np.asarray(split.lengths), kind="stable")
    loss, tokens = np.zeros(count), np.ones(count)
    predicted = np.zeros(count, dtype=np.int64)
    causal = config.task == "causal-lm"
    for start in range(0, count, size):
        rows = order[start : start + size]
        inputs = {name: value.to(on) for name, value in split.batch(rows).items()}
        targets = inputs.pop("labels")
        with torch.autocast(on.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            logits = model(**inputs).logits
        loss[rows], tokens[rows] = (values.cpu().numpy() for values in row_losses(logits, targets))
        if not causal:
            predicted[rows] = logits.argmax(-1).cpu().numpy()
    if causal:
        return Scores(loss, tokens)
    assert split.labels is not None
    return Scores(loss, tokens, predicted, split.labels.numpy().astype(np.int64))


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
    lacks are left out.

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

    loss, tokens = per_kind(scores.loss), per_kind(scores.tokens)
    hits = None if scores.predicted is None else per_kind((scores.predicted == scores.labels).astype(np.float64))
    found = {}
    for client, rows in zip(held.client_ids, held.indices, strict=True):
        if clients is not None and client not in clients:
            continue
        weight = np.where(present > 0, np.bincount(of_train[rows], minlength=len(names)), 0).astype(np.float64)
        if not weight.any():
            continue
        mean = float((weight * loss).sum() / (weight * tokens).sum())
        found[client] = {"loss": mean}
        if hits is None:
            found[client]["perplexity"] = math.exp(min(mean, 700.0))
        else:
            found[client]["accuracy"] = float((weight * hits).sum() / weight.sum())
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


def spread(values: dict[str, dict[str, float]], key: str) -> dict[str, float]:
    """Summarise one metric over groups: its mean, and the mean of the worst tenth (at least one group)."""
    ordered = np.sort([metrics[key] for metrics in values.values()])
    if key in ("loss", "perplexity"):
        ordered = ordered[::-1]
    worst = ordered[: max(1, math.ceil(len(ordered) / 10))]
    return {"mean": float(ordered.mean()), "worst_tenth": float(worst.mean())}
