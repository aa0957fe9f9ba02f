"""Local training: what one client does to the adapter in a round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.config import TrainConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.models import torch_seed
from fedpeft.seeds import derive_seed, generator
from fedpeft.tasks.losses import mean_loss


@dataclass(frozen=True)
class LocalResult:
    """What local training reports.

    Parameters
    ----------
    loss : float
        Mean over the steps of the batch's mean loss, in nats, without proximal term or penalty; in private training
        the mean over all rows drawn, NaN if none was.
    steps : int
        Optimiser steps taken.
    seconds : float
        Wall time.
    """

    loss: float
    steps: int
    seconds: float


def num_steps(train: TrainConfig, num_examples: int) -> int:
    """Return the optimiser steps of one round."""
    if train.local_steps is not None:
        return train.local_steps
    return (train.local_epochs or 1) * math.ceil(num_examples / train.batch_size)


def batches(rows: NDArray[np.int64], size: int, steps: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield `steps` batches of row indices: shuffled passes over the rows, the last batch of a pass being smaller.

    Parameters
    ----------
    rows : array of int, shape (n,)
        The client's rows.
    size : int
        Rows a batch.
    steps : int
        Number of batches.
    rng : numpy.random.Generator
        Draws each pass's order.
    """
    while True:
        order = rng.permutation(rows)
        for start in range(0, len(order), size):
            if steps == 0:
                return
            yield order[start : start + size]
            steps -= 1


def learning_rate(train: TrainConfig, progress: float) -> float:
    """Return the step size when `progress`, in [0, 1), of all rounds' steps is done."""
    if train.lr_schedule == "linear":
        return train.learning_rate * (1 - progress)
    if train.lr_schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return train.learning_rate


def _optimizer(train: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=train.learning_rate, momentum=train.momentum, weight_decay=train.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)


def training_mode(model: torch.nn.Module) -> None:
    """Put a model into the mode in which adapters are trained."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # its running statistics belong to the frozen base, and rows of clients would move them


class Gradients(Protocol):
    """How a step's gradient comes about: plainly, or privately."""

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Yield the rows of each step; the number of batches is the number of steps."""

    def compute(self, batch: NDArray[np.int64]) -> tuple[float | Tensor, int]:
        """Leave the gradient of a batch in ``.grad``; return the sum of losses, and what divides it into a mean."""


@dataclass(frozen=True)
class PlainGradients:
    """The gradient of the batch's mean loss.

    Parameters
    ----------
    adapted : AdaptedModel
        The model.
    split : EncodedSplit
        The encoded rows.
    rows : array of int, shape (n,)
        Which of them are the client's.
    train : TrainConfig
        How.
    steps : int
        How often.
    rng : numpy.random.Generator
        Draws each pass's order.
    """

    adapted: AdaptedModel
    split: EncodedSplit
    rows: NDArray[np.int64]
    train: TrainConfig
    steps: int
    rng: np.random.Generator

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Yield shuffled passes over the rows."""
        return batches(self.rows, self.train.batch_size, self.steps, self.rng)

    def compute(self, batch: NDArray[np.int64]) -> tuple[float | Tensor, int]:
        """Return the batch's mean loss, once."""
        adapted = self.adapted
        loss = mean_loss(adapted.task, adapted.model, self.split.batch(batch), self.train.precision)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), 1


def train_locally(
    adapted: AdaptedModel,
    split: EncodedSplit,
    rows: NDArray[np.int64],
    train: TrainConfig,
    *,
    names: Sequence[str] | None = None,
    seed: int,
    client_id: str,
    server_round: int,
    num_rounds: int,
    penalty: Callable[[], torch.Tensor] | None = None,
    num_examples: int | None = None,
    private: Callable[[torch.optim.Optimizer], Gradients] | None = None,
    dropout_seed: int | None = None,
) -> LocalResult:
    """Train the loaded adapter on one client's rows, in place.

    Batches and dropout depend on the run's seed, the round and the client's id alone.

    Parameters
    ----------
    adapted : AdaptedModel
        Holds the adapter that the server sent.
    split : EncodedSplit
        The encoded rows.
    rows : array of int, shape (n,)
        Which of them are this client's.
    train : TrainConfig
        How.
    names : sequence of str, optional
        What is trained; all of ``adapted.trained`` if not given.
    seed : int
        The run's seed.
    client_id : str
        Whose round this is.
    server_round, num_rounds : int
        Place of this round, from 1, for the learning rate's schedule.
    penalty : callable, optional
        What to add to each step's loss; not part of the loss that is reported.
    num_examples : int, optional
        Rows that count for the number of steps; those of `rows` if not given.
    private : callable, optional
        Makes private gradients for an optimizer, see `fedpeft.privacy.dp_sgd`; plain ones if not given. Gradients of
        regularisers, which depend on no row, come on top of the noise.
    dropout_seed : int, optional
        In place of one that follows from the run's seed.
    """
    started = time.perf_counter()
    parameters = adapted.begin_training(adapted.trained if names is None else names)
    start = [parameter.detach().clone() for parameter in parameters] if train.proximal_mu else []
    optimizer = _optimizer(train, parameters)
    steps = num_steps(train, len(rows) if num_examples is None else num_examples)
    if private is not None:
        gradients = private(optimizer)
    else:
        rng = generator(seed, "batches", server_round, client_id)
        gradients = PlainGradients(adapted, split, rows, train, steps, rng)
    losses: list[float | Tensor] = []
    counted = 0
    training_mode(adapted.model)
    drop = derive_seed(seed, "dropout", server_round, client_id) if dropout_seed is None else dropout_seed
    with torch_seed(drop):
        for step, batch in enumerate(gradients.batches()):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, (server_round - 1 + step / steps) / num_rounds)
            optimizer.zero_grad(set_to_none=True)
            loss, count = gradients.compute(batch)
            if penalty is not None:
                penalty().backward()  # type: ignore[no-untyped-call]
            for parameter, anchor in zip(parameters, start, strict=False):
                # FedProx: the gradient of mu/2 |w - w_global|^2
                if parameter.grad is not None:  # else the loss does not depend on it, and it has not moved
                    parameter.grad.add_(parameter.detach() - anchor, alpha=train.proximal_mu)
            if train.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
            optimizer.step()
            losses.append(loss)
            counted += count
    adapted.model.eval()
    for parameter in parameters:
        parameter.grad = None
    total = torch.stack([torch.as_tensor(loss, dtype=torch.float64) for loss in losses]).sum()
    return LocalResult(float(total) / counted if counted else math.nan, steps, time.perf_counter() - started)
