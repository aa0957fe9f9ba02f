"""Local training: what one client does to the adapter in a round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import role_of
from fedpeft.config import TrainConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import AdapterError
from fedpeft.models import torch_seed
from fedpeft.seeds import derive_seed, generator
from fedpeft.tasks.losses import mean_loss
from fedpeft.training.optimizers import OPTIMIZERS, SCHEDULES


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
    return (train.local_epochs or 1) * math.ceil(num_examples / train.batch_size)


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


def learning_rate(train: TrainConfig, progress: float) -> float:
    """Return the step size when `progress`, in [0, 1), of all rounds' steps is done."""
    return train.learning_rate * SCHEDULES.find(train.lr_schedule).factor(progress)


def make_optimizer(train: TrainConfig, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the configured optimiser of the live parameters, by their names in the adapter.

    Raises
    ------
    AdapterError
        It steps factors A and B together, and a layer has not both among the parameters.
    """
    record = OPTIMIZERS.find(train.optimizer)
    if record.needs_pairs and not _in_pairs(parameters):
        raise AdapterError(
            f"train.optimizer = '{record.name}' steps both factors of a layer together, and here one of them is not "
            "trained. Use an adapter and a strategy that train both, such as the defaults, or another optimizer."
        )
    return record.build(parameters, train.learning_rate, train.options)


def _in_pairs(names: Iterable[str]) -> bool:
    of_role = {role: {name.replace(f"lora_{role}", "") for name in names if role_of(name) == role} for role in "AB"}
    return bool(of_role["A"]) and of_role["A"] == of_role["B"]


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
        train = self.train
        return batches(
            self.rows, train.batch_size, self.steps, self.rng, lengths=self.split.lengths, bucket=train.bucket
        )

    def compute(self, batch: NDArray[np.int64]) -> tuple[float | Tensor, int]:
        """Return the batch's mean loss, once."""
        adapted = self.adapted
        loss = mean_loss(adapted.task, adapted.model, self.split.batch(batch), self.train.precision)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), 1


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
    correction : mapping of str to Tensor
        What is added to each step's gradient of some tensors, last of all: after regularisers, and not clipped.
    """

    seed: int
    client_id: str
    server_round: int
    num_rounds: int
    num_examples: int | None = None
    dropout_seed: int | None = None
    correction: Mapping[str, Tensor] = field(default_factory=dict)

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

    def progress(self, share: float) -> float:
        """Return how much of all rounds' steps is done when a share of this round's is."""
        return (self.server_round - 1 + share) / self.num_rounds


def train_locally(
    adapted: AdaptedModel,
    split: EncodedSplit,
    rows: NDArray[np.int64],
    train: TrainConfig,
    turn: Turn,
    *,
    names: Sequence[str] | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
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
    penalty : callable, optional
        What to add to each step's loss; not part of the loss that is reported.
    private : callable, optional
        Makes private gradients for an optimizer, see `fedpeft.privacy.dp_sgd`; plain ones if not given. Gradients of
        regularisers, which depend on no row, come on top of the noise.
    """
    started = time.perf_counter()
    names = adapted.trained if names is None else names
    parameters = adapted.begin_training(names)
    optimizer = make_optimizer(train, named := dict(zip(names, parameters, strict=True)))
    steps = num_steps(train, len(rows) if turn.num_examples is None else turn.num_examples)
    if private is not None:
        gradients = private(optimizer)
    else:
        gradients = PlainGradients(adapted, split, rows, train, steps, turn.batches)
    regularise = _regulariser(train, parameters, penalty)
    losses, counted, rate_sum = list[float | Tensor](), 0, 0.0
    training_mode(adapted.model)
    with torch_seed(turn.dropout):
        for step, batch in enumerate(gradients.batches()):
            rate_sum += _set_rate(optimizer, learning_rate(train, turn.progress(step / steps)))
            optimizer.zero_grad(set_to_none=True)
            loss, count = gradients.compute(batch)
            regularise()
            _correct(named, turn.correction)
            optimizer.step()
            losses.append(loss)
            counted += count
    scoring_mode(adapted.model)
    optimizer.zero_grad(set_to_none=True)
    return LocalResult(_mean(losses, counted), steps, time.perf_counter() - started, rate_sum)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _mean(losses: Sequence[float | Tensor], counted: int) -> float:
    total = torch.stack([torch.as_tensor(loss, dtype=torch.float64) for loss in losses]).sum()
    return float(total) / counted if counted else math.nan


def _correct(parameters: Mapping[str, nn.Parameter], correction: Mapping[str, Tensor]) -> None:
    for name, own in correction.items():
        parameter = parameters[name]
        own = own.to(parameter.detach())
        parameter.grad = own.clone() if parameter.grad is None else parameter.grad.add_(own)


def _regulariser(
    train: TrainConfig, parameters: Sequence[torch.nn.Parameter], penalty: Callable[[], torch.Tensor] | None
) -> Callable[[], None]:
    """Return what adds the penalty's gradient and FedProx's to a step's, and clips it; it knows where all began."""
    start = [parameter.detach().clone() for parameter in parameters] if train.proximal_mu else []

    def regularise() -> None:
        if penalty is not None:
            penalty().backward()  # type: ignore[no-untyped-call]
        for parameter, anchor in zip(parameters, start, strict=False):
            # FedProx: the gradient of mu/2 |w - w_global|^2
            if parameter.grad is not None:  # else the loss does not depend on it, and it has not moved
                parameter.grad.add_(parameter.detach() - anchor, alpha=train.proximal_mu)
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)

    return regularise
