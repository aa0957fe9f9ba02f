"""Losses row by row: the ones that training, scoring and private training share, and how a model comes to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpeft.data.columns import IGNORED
from fedpeft.precision import arithmetic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedpeft.tasks.task import Task


def label_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of each row's label.

    Parameters
    ----------
    logits : Tensor
        ``(b, labels)``.
    targets : Tensor
        Label ids ``(b,)``.

    Returns
    -------
    tuple of Tensor
        In nats, ``(b,)``, float64, and ones, ``(b,)``, int64.
    """
    from torch import nn

    nll = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return nll.double(), nll.new_ones(nll.shape).long()


def next_token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihoods of the tokens of each row that count.

    Parameters
    ----------
    logits : Tensor
        ``(b, t, vocabulary)``, where position t predicts token t + 1; what an adapter puts before a row's own tokens
        may have scores too, in front.
    targets : Tensor
        Token ids ``(b, t)``, with -100 where a token does not count.

    Returns
    -------
    tuple of Tensor
        In nats, ``(b,)``, float64, and how many there are, ``(b,)``, int64.
    """
    import torch
    from torch import nn

    following = following_of(targets)
    if logits.shape[1] > targets.shape[1]:
        logits = logits[:, -targets.shape[1] :]
    scores = (logits if logits.dtype == torch.float64 else logits.float()).flatten(0, 1)  # (b t, vocabulary)
    nll = nn.functional.cross_entropy(scores, following.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(targets.shape).double().sum(1), (following != IGNORED).sum(1)


def following_of(targets: Tensor) -> Tensor:
    """Return the token that each position predicts, ``(b, t)``: labels are moved, which are smaller than scores."""
    from torch import nn

    return nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED)


def most_likely(logits: Tensor) -> Tensor:
    """Return the label id of the largest score of each row, ``(b,)``."""
    return logits.argmax(-1)


def logits_of(model: nn.Module, batch: Mapping[str, Tensor], precision: str = "fp32") -> Tensor:
    """Run a model over a batch, and leave its labels out: the model's own loss is not asked for.

    Parameters
    ----------
    model : torch.nn.Module
        With or without an adapter.
    batch : mapping of str to Tensor
        See `fedpeft.data.splits.EncodedSplit.batch`.
    precision : str
        ``train.precision``.
    """
    on = next(model.parameters()).device
    inputs = {name: value.to(on) for name, value in batch.items() if name != "labels"}
    with arithmetic(on, precision):
        logits: Tensor = model(**inputs).logits
    return logits


def needs_some_logits(task: Task) -> bool:
    """Tell whether a task's losses are of next tokens, which need the logits of some positions alone."""
    return task.per_token and task.losses is next_token_losses


def batch_losses(
    task: Task, model: nn.Module, batch: Mapping[str, Tensor], precision: str = "fp32", *, by_hooks: bool = False
) -> tuple[Tensor, Tensor]:
    """Return each row's sum of losses, and what it counts; logits of tokens are computed where these count alone.

    They are computed in blocks of bounded size and kept by nobody, see `fedpeft.tasks.heads`. The whole model runs for
    other tasks, and where a model cannot be taken apart.

    Parameters
    ----------
    task : Task
        What the model is trained for.
    model : torch.nn.Module
        With or without an adapter.
    batch : mapping of str to Tensor
        See `fedpeft.data.splits.EncodedSplit.batch`.
    precision : str
        ``train.precision``.
    by_hooks : bool
        Whether hooks take each row's gradients from the layers, each of which must then be called once, with all rows.

    Returns
    -------
    tuple of Tensor
        In nats, ``(b,)``, float64, and ``(b,)``, int64, on the model's device.
    """
    labels = batch["labels"].to(next(model.parameters()).device)
    if needs_some_logits(task):
        from fedpeft.tasks.heads import divided, token_losses

        inputs = {name: value.to(labels.device) for name, value in batch.items() if name != "labels"}
        parts = divided(model, inputs) if len(labels) else None
        if parts is not None and not (by_hooks and parts.head_is_adapted):
            following = following_of(labels)
            losses = token_losses(parts, inputs, following, precision)
            return losses.double().sum(1), (following != IGNORED).sum(1)
    return task.losses(logits_of(model, batch, precision), labels)


def mean_loss(task: Task, model: nn.Module, batch: Mapping[str, Tensor], precision: str = "fp32") -> Tensor:
    """Return the loss of a batch that training minimises: the mean over all that its rows count."""
    sums, counts = batch_losses(task, model, batch, precision)
    return sums.sum() / counts.sum()
