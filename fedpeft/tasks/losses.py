"""Negative log-likelihoods row by row, for scores and for gradients that must not mix rows."""

from __future__ import annotations

from torch import Tensor, nn

from fedpeft.data.splits import IGNORED


def row_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's loss and what it counts.

    Parameters
    ----------
    logits : Tensor
        ``(b, labels)`` of a classifier, or ``(b, t, vocabulary)`` of a causal language model.
    targets : Tensor
        Label ids ``(b,)``; or token ids ``(b, t)``, with -100 where a token does not count.

    Returns
    -------
    tuple of Tensor
        Sum of the row's negative log-likelihoods in nats, ``(b,)``, float64, and how many there are, ``(b,)``, int64.
    """
    if targets.ndim == 1:
        nll = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return nll.double(), nll.new_ones(nll.shape).long()
    logits, targets = logits[:, :-1].float(), targets[:, 1:]  # position t predicts token t + 1
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(targets.shape).double().sum(1), (targets != IGNORED).sum(1)
