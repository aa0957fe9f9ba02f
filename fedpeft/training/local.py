"""Local training: what one client does to the adapter in a round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.config import TrainConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.models import torch_seed
from fedpeft.seeds import derive_seed, generator
from fedpeft.tasks.losses import batch_losses
from fedpeft.training.neftune import EmbeddingNoise
from fedpeft.training.steps import (
    Additions,
    learning_rate,
    loss_scaler,
    make_optimizer,
    regulariser,
    set_rate,
    take_step,
)


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
    rate_sum : float
        Sum of the steps' learning rates.
    """

    loss: float
    steps: int
    seconds: float
    rate_sum: float = 0.0


def num_steps(train: TrainConfig, num_examples: int) -> int:
    """Return the optimiser steps of one round."""
    if train.local_steps is not None:
        return train.local_steps
    return (train.local_epochs or 1) * math.ceil(num_examples / train.rows_a_step)


def batches(
    rows: NDArray[np.int64],
    size: int,
    steps: int,
    rng: np.random.Generator,
    *,
    lengths: NDArray[np.int64] | None = None,
    bucket: int = 1,
) -> Iterator[NDArray[np.int64]]:
    """Yield `steps` batches of row indices: shuffled passes over the rows, one batch of a pass being smaller.

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
    lengths : array of int, optional
        Tokens of each row of the split that `rows` indexes; all rows count as equally long if not given.
    bucket : int
        Of so many batches that follow each other, rows are sorted by length into batches, and these are shuffled: they
        need less padding, and every pass still takes each row once.
    """
    if lengths is not None and (bucket == 1 or not np.ptp(lengths[rows])):
        lengths = None
    while True:
        order = rng.permutation(rows)
        for start in range(0, len(order), size if lengths is None else size * bucket):
            if lengths is None:
                group = [order[start : start + size]]
            else:
                group = _by_length(order[start : start + size * bucket], size, lengths, rng)
            for batch in group:
                if steps == 0:
                    return
                yield batch
                steps -= 1


def _by_length(
    rows: NDArray[np.int64], size: int, lengths: NDArray[np.int64], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Return batches of rows of like lengths, in any order; which of them is smaller is drawn too."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    sizes = [min(size, len(rows) - start) for start in range(0, len(rows), size)]
    cuts = np.cumsum(rng.permutation(sizes))[:-1]
    cut = np.split(ordered, cuts)
    return [cut[index] for index in rng.permutation(len(cut))]


def training_mode(model: nn.Module) -> None:
    """Put a model into the mode in which adapters are trained."""
    _set_mode(model, training=True)


def scoring_mode(model: nn.Module) -> None:
    """Put a model back into the mode in which it is scored, in which nothing is drawn."""
    _set_mode(model, training=False)


MODES = "_fedpeft_modes"  # kept with the model, and gone with it


def _set_mode(model: nn.Module, *, training: bool) -> None:
    """Set every module's mode; how a model's own ``train`` sets them is found out once, since it takes a while."""
    if MODES not in vars(model):
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()  # its running statistics belong to the frozen base, and rows of clients would move them
        vars(model)[MODES] = [(module, module.training) for module in model.modules()]
    for module, trains in vars(model)[MODES]:
        vars(module)["training"] = training and trains


class Gradients(Protocol):
    """How a step's gradient comes about: plainly, or privately."""

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Yield the rows of each step; the number of batches is the number of steps."""

    def compute(self, batch: NDArray[np.int64]) -> tuple[float | Tensor, int]:
        """Leave the gradient of a batch in ``.grad``; return the sum of losses, and what divides it into a mean."""


@dataclass(frozen=True)
class PlainGradients:
    """The gradient of the batch's mean loss: of all that its rows count, in however many parts it is computed.

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
    scaler : torch.amp.GradScaler, optional
        Of the loss, in fp16.
    """

    adapted: AdaptedModel
    split: EncodedSplit
    rows: NDArray[np.int64]
    train: TrainConfig
    steps: int
    rng: np.random.Generator
    scaler: torch.amp.GradScaler | None = None

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Yield shuffled passes over the rows."""
        train = self.train
        return batches(
            self.rows, train.rows_a_step, self.steps, self.rng, lengths=self.split.lengths, bucket=train.bucket
        )

    def compute(self, batch: NDArray[np.int64]) -> tuple[float | Tensor, int]:
        """Return the batch's mean loss, once."""
        size = self.train.batch_size
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        first, count = self._backward(parts[0], None)
        if len(parts) == 1:
            return first / count, 1
        # all parts are divided by the first one's count, which keeps sums in range, and in the end by all of them's
        total, counted = first, count
        for part in parts[1:]:
            loss, more = self._backward(part, count)
            total, counted = total + loss, counted + more
        for parameter in self.adapted.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_((count / counted).to(parameter.grad))
        return total / counted, 1

    def _backward(self, rows: NDArray[np.int64], divisor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add the gradient of the sum of losses, divided by their own count if not given; return sum and count."""
        adapted, inputs = self.adapted, self.split.batch(rows)
        with EmbeddingNoise(adapted.model, self.train.neftune_alpha).of(inputs):
            sums, counts = batch_losses(adapted.task, adapted.model, inputs, self.train.precision)
        total, count = sums.sum(), counts.sum()
        loss = total / (count if divisor is None else divisor)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        return total.detach(), count


@dataclass(frozen=True)
class Turn:
    """One client's part in one round, from which follow its batches, its dropout and its learning rates.

    Parameters
    ----------
    seed : int
        The run's seed.
    client_id : str
        Whose turn it is.
    server_round, num_rounds : int
        Place of the round, from 1, for the learning rate's schedule.
    num_examples : int, optional
        Rows that count for the number of steps; all of the client's if not given.
    dropout_seed : int, optional
        In place of one that follows from the run's seed.
    """

    seed: int
    client_id: str
    server_round: int
    num_rounds: int
    num_examples: int | None = None
    dropout_seed: int | None = None

    @property
    def batches(self) -> np.random.Generator:
        """What draws the order of the rows."""
        return generator(self.seed, "batches", self.server_round, self.client_id)

    @property
    def dropout(self) -> int:
        """The seed of what dropout draws."""
        if self.dropout_seed is not None:
            return self.dropout_seed
        return derive_seed(self.seed, "dropout", self.server_round, self.client_id)

    def rate(self, train: TrainConfig, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of this round's steps."""
        return learning_rate(train, self.server_round, self.num_rounds, step=step, steps=steps)


def train_locally(
    adapted: AdaptedModel,
    split: EncodedSplit,
    rows: NDArray[np.int64],
    train: TrainConfig,
    turn: Turn,
    *,
    names: Sequence[str] | None = None,
    additions: Additions | None = None,
    private: Callable[[torch.optim.Optimizer], Gradients] | None = None,
) -> LocalResult:
    """Train the loaded adapter on one client's rows, in place.

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
    turn : Turn
        Whose round this is, and which.
    names : sequence of str, optional
        What is trained; all of ``adapted.trained`` if not given.
    additions : Additions, optional
        What comes on top of each step's gradient.
    private : callable, optional
        Makes private gradients for an optimizer, see `fedpeft.privacy.dp_sgd`; plain ones if not given. Gradients of
        regularisers, which depend on no row, come on top of the noise.
    """
    started = time.perf_counter()
    names = adapted.trained if names is None else names
    parameters = dict(zip(names, adapted.begin_training(names), strict=True))
    optimizer, scaler = make_optimizer(train, parameters), loss_scaler(train, adapted.device)
    steps = num_steps(train, len(rows) if turn.num_examples is None else turn.num_examples)
    gradients: Gradients = PlainGradients(adapted, split, rows, train, steps, turn.batches, scaler)
    if private is not None:
        gradients = private(optimizer)
    regularise = regulariser(train, parameters, additions or Additions())
    losses, counted, rates = list[float | Tensor](), 0, list[float]()
    training_mode(adapted.model)
    with torch_seed(turn.dropout):
        for step, batch in enumerate(gradients.batches()):
            rates.append(turn.rate(train, step, steps))
            set_rate(optimizer, rates[-1])
            loss, count = take_step(optimizer, partial(gradients.compute, batch), regularise, scaler)
            losses.append(loss)
            counted += count
    scoring_mode(adapted.model)
    optimizer.zero_grad(set_to_none=True)
    total = torch.stack([torch.as_tensor(loss, dtype=torch.float64) for loss in losses]).sum()
    mean = float(total) / counted if counted else math.nan
    return LocalResult(mean, steps, time.perf_counter() - started, sum(rates))
