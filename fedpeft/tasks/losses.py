"""Losses row by row: the ones that training, scoring and private training share, and how a model comes to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpeft.data.columns import IGNORED

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
    from torch import nn

    # labels are moved rather than scores, which are many times larger
    following = nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED)  # (b, t)
    if logits.shape[1] > targets.shape[1]:
        logits = logits[:, -targets.shape[1] :]
    scores = logits.float().flatten(0, 1)  # (b t, vocabulary)
    nll = nn.functional.cross_entropy(scores, following.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(targets.shape).double().sum(1), (following != IGNORED).sum(1)


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
    import torch

    on = next(model.parameters()).device
    inputs = {name: value.to(on) for name, value in batch.items() if name != "labels"}
    with torch.autocast(on.type, torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(**inputs).logits
    return logits


def mean_loss(task: Task, model: nn.Module, batch: Mapping[str, Tensor], precision: str = "fp32") -> Tensor:
    """Return the loss of a batch that training minimises: the mean over all that its rows count."""
    logits = logits_of(model, batch, precision)
    sums, counts = task.losses(logits, batch["labels"].to(logits.device))
    return sums.sum() / counts.sum()
