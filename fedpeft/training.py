"""Local training: what one client does to the adapter in a round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft.adapters import AdaptedModel
from fedpeft.config import TrainConfig
from fedpeft.data.encoding import EncodedSplit
from fedpeft.models import seeded
from fedpeft.seeds import generator


@dataclass(frozen=True)
class LocalResult:
    """What local training reports.

    Parameters
    ----------
    loss : float
        Mean over the steps of the batch's mean loss, in nats, without proximal term or penalty.
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
    """
    started = time.perf_counter()
    parameters = adapted.begin_training(adapted.trained if names is None else names)
    start = [parameter.detach().clone() for parameter in parameters] if train.proximal_mu else []
    optimizer = _optimizer(train, parameters)
    steps = num_steps(train, len(rows))
    rng = generator(seed, "batches", server_round, client_id)
    autocast = torch.autocast(adapted.device.type, torch.bfloat16, enabled=train.precision == "bf16")
    losses = []
    adapted.model.train()
    for module in adapted.model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # its running statistics belong to the frozen base, and rows of clients would move them
    with seeded(seed, "dropout", server_round, client_id):
        for step, batch in enumerate(batches(rows, train.batch_size, steps, rng)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, (server_round - 1 + step / steps) / num_rounds)
            inputs = {name: value.to(adapted.device) for name, value in split.batch(batch).items()}
            with autocast:
                loss = adapted.model(**inputs).loss
            optimizer.zero_grad(set_to_none=True)
            (loss if penalty is None else loss + penalty()).backward()
            for parameter, anchor in zip(parameters, start, strict=False):
                # FedProx: the gradient of mu/2 |w - w_global|^2
                if parameter.grad is not None:  # else the loss does not depend on it, and it has not moved
                    parameter.grad.add_(parameter.detach() - anchor, alpha=train.proximal_mu)
            if train.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
    adapted.model.eval()
    for parameter in parameters:
        parameter.grad = None
    return LocalResult(float(torch.stack(losses).double().mean()), steps, time.perf_counter() - started)
