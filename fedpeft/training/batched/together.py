"""The local rounds of many clients at once: stacked adapters, and one pass for the rows of a step of all of them.

What is minimised is the sum over clients of each one's own mean loss. Nobody's loss depends on another's tensors, so
that its gradient by a client's tensors is that of the client alone, and everything after it (regularisers, clipping,
the optimiser) is done for each client by itself. The result differs from `fedpeft.training.local.train_locally` by the
rounding of sums alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import role_of
from fedpeft.config import TrainConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.tasks.losses import batch_losses
from fedpeft.tasks.packing import packing_of
from fedpeft.training.batched.layers import OwnLayers, drops, stacked, unstacked
from fedpeft.training.local import (
    LocalResult,
    PlainGradients,
    Turn,
    num_steps,
    training_mode,
)
from fedpeft.training.optimizers import OPTIMIZERS
from fedpeft.training.steps import make_optimizer, set_rate

Rows = NDArray[np.int64]
CLIP_FLOOR = 1e-6  # torch's own, see torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Part:
    """One client's part in a training of many.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        The whole adapter that its round begins with.
    scaling : float
        Of its update.
    rows : array of int, shape (n,)
        Which of the rows are its own.
    turn : Turn
        Whose round this is, and which.
    """

    tensors: Mapping[str, Tensor]
    scaling: float
    rows: Rows
    turn: Turn

    def steps(self, train: TrainConfig) -> int:
        """Return its optimiser steps."""
        return num_steps(train, len(self.rows) if self.turn.num_examples is None else self.turn.num_examples)

    def rates(self, train: TrainConfig) -> tuple[float, ...]:
        """Return the learning rate of all its steps: one number where it never changes. Those who share it may join."""
        steps = self.steps(train)
        rates = tuple(self.turn.rate(train, step, steps) for step in range(steps))
        return rates[:1] if len(set(rates)) == 1 else rates


@dataclass(frozen=True)
class Trained:
    """What became of one client.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        What was trained, on the CPU.
    result : LocalResult
        What it reports; its seconds are its share of all.
    """

    tensors: Mapping[str, Tensor]
    result: LocalResult


@dataclass
class Stacks:
    """The tensors of the clients that are still at work, each as one ``(k, *shape)``.

    Parameters
    ----------
    frozen : dict of str to Tensor
        What nobody trains in this round.
    trained : dict of str to nn.Parameter
        What is trained, in the order of its names.
    scaling : Tensor
        Of each client's update, ``(k,)``.
    clients : sequence of int
        The client at each place.
    shapes : sequence of mapping of str to tuple of int
        Of each one's own tensors, which may be of smaller rank.
    """

    frozen: dict[str, Tensor]
    trained: dict[str, nn.Parameter]
    scaling: Tensor
    clients: Sequence[int]
    shapes: Sequence[Mapping[str, tuple[int, ...]]]

    @classmethod
    def of(cls, adapted: AdaptedModel, parts: Sequence[Part], clients: Sequence[int], names: Sequence[str]) -> Stacks:
        """Stack what these of the clients begin with."""
        chosen = [parts[client] for client in clients]

        def stack(name: str) -> Tensor:
            like = adapted.parameter(name).detach()
            return stacked([part.tensors[name] for part in chosen], like, role_of(name))

        return cls(
            {name: stack(name) for name in sorted(adapted.initial.keys() - set(names))},
            {name: nn.Parameter(stack(name).contiguous()) for name in names},
            torch.tensor([part.scaling for part in chosen], device=adapted.device),
            clients,
            [{name: tuple(part.tensors[name].shape) for name in names} for part in chosen],
        )

    def __len__(self) -> int:
        return len(self.scaling)

    def own(self, client: int) -> dict[str, Tensor]:
        """Return copies of what one client has trained, on the CPU."""
        return {
            name: unstacked(whole.detach()[client], self.shapes[client][name]).to("cpu", copy=True).contiguous()
            for name, whole in self.trained.items()
        }

    def leave(self, count: int, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
        """Go on with so many of the first clients: the others have done their steps. Return what these have trained."""
        done = {self.clients[place]: self.own(place) for place in range(count, len(self))}
        if not done:
            return done
        self.frozen = {name: whole[:count] for name, whole in self.frozen.items()}
        self.scaling = self.scaling[:count]
        for parameter in self.trained.values():
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = value[:count]
            parameter.grad = None
            parameter.data = parameter.data[:count]
        return done


class JointGradients(Protocol):
    """How the gradients of a step come about for all clients at work: plainly, or privately."""

    def batches(self, client: int) -> Iterator[Rows]:
        """Yield the rows of each of a client's steps."""

    def compute(self, stacks: Stacks, batches: Sequence[Rows]) -> tuple[Tensor, Sequence[int]]:
        """Leave the gradients of the clients' batches in ``.grad`` of the stacks.

        Returns
        -------
        tuple of Tensor and sequence of int
            Of each client the sum of losses, ``(k,)``, and what divides it into a mean.
        """


@dataclass(frozen=True)
class JointPlainGradients:
    """The gradients of the clients' mean losses.

    Parameters
    ----------
    adapted : AdaptedModel
        The model.
    layers : OwnLayers
        Its layers.
    split : EncodedSplit
        The encoded rows.
    train : TrainConfig
        How.
    parts : sequence of Part
        The clients.
    """

    adapted: AdaptedModel
    layers: OwnLayers
    split: EncodedSplit
    train: TrainConfig
    parts: Sequence[Part]

    def batches(self, client: int) -> Iterator[Rows]:
        """Yield the batches that the client would have by itself."""
        part, steps = self.parts[client], self.parts[client].steps(self.train)
        return PlainGradients(self.adapted, self.split, part.rows, self.train, steps, part.turn.batches).batches()

    def compute(self, stacks: Stacks, batches: Sequence[Rows]) -> tuple[Tensor, Sequence[int]]:
        """Return each client's mean loss, once."""
        sizes = np.array([len(batch) for batch in batches])
        widest = int(sizes.max())
        # clients with fewer rows repeat one of them, which does not count
        rows = np.concatenate([np.pad(batch, (0, widest - len(batch)), "edge") for batch in batches])
        inputs = self.split.batch(rows)
        with self.layers.with_stacks({**stacks.frozen, **stacks.trained}, stacks.scaling):
            sums, counts = batch_losses(self.adapted.task, self.adapted.model, inputs, self.train.precision)
            sums, counts = sums.view(len(batches), widest), counts.view(len(batches), widest)
            if sizes.min() < widest:
                real = torch.from_numpy(np.arange(widest) < sizes[:, None]).to(sums.device)  # (k, b)
                sums, counts = torch.where(real, sums, 0.0), torch.where(real, counts, 0)
            losses = sums.sum(1) / counts.sum(1)  # (k,)
            losses.sum().backward()  # type: ignore[no-untyped-call] # some layers may run again here, in the stacks
        return losses.detach(), [1] * len(batches)


def why_not(adapted: AdaptedModel, layers: OwnLayers, train: TrainConfig) -> str:
    """Say why clients cannot be trained together, in words; empty if they can."""
    if layers.refusal:
        return layers.refusal
    if not OPTIMIZERS.find(train.optimizer).elementwise:
        return f"train.optimizer = '{train.optimizer}' does not step each number by itself"
    if train.accumulation > 1:
        return "train.accumulation makes a step of parts that are small enough one by one"
    if train.neftune_alpha:
        return "train.neftune_alpha draws noise, which each client draws by itself"
    if train.precision == "fp16":
        return "train.precision = 'fp16' scales each client's losses by itself"
    if packing_of(adapted.model) is not None:
        return "data.packing puts rows of one client behind each other, and rows of several would share a sequence"
    if drops(adapted.model):
        return "dropout is active, whose masks each client draws by itself"
    return ""


def train_together(
    adapted: AdaptedModel,
    train: TrainConfig,
    parts: Sequence[Part],
    names: Sequence[str],
    gradients: JointGradients,
) -> list[Trained]:
    """Train many clients' adapters at once, each on its own rows; the resident adapter is left as it is.

    Parameters
    ----------
    adapted : AdaptedModel
        The model; changes of the base must be in it already, and its adapter is not looked at.
    train : TrainConfig
        How.
    parts : sequence of Part
        The clients, of equal `Part.rates` as far as their steps go.
    names : sequence of str
        What is trained.
    gradients : JointGradients
        Gives a step's gradients.

    Returns
    -------
    list of Trained
        In the order of `parts`.
    """
    started = time.perf_counter()
    steps = [part.steps(train) for part in parts]
    order = sorted(range(len(parts)), key=lambda client: -steps[client])  # whoever is done first comes last
    adapted.begin_training(())
    stacks = Stacks.of(adapted, parts, order, names)
    optimizer = make_optimizer(train, stacks.trained)
    regularise = _regulariser(train, list(stacks.trained.values()))
    drawn = [gradients.batches(client) for client in order]
    losses: list[Tensor] = []
    counted = np.zeros(len(parts))
    after: dict[int, dict[str, Tensor]] = {}
    training_mode(adapted.model)
    try:
        for step in range(max(steps)):
            batches = [next(drawn[place]) for place in range(len(stacks))]
            set_rate(optimizer, parts[order[0]].turn.rate(train, step, steps[order[0]]))
            optimizer.zero_grad(set_to_none=True)
            loss, counts = gradients.compute(stacks, batches)
            regularise()
            optimizer.step()
            losses.append(loss.double())
            counted[: len(counts)] += counts
            after |= stacks.leave(sum(steps[client] > step + 1 for client in order), optimizer)
    finally:
        adapted.model.eval()
    means = dict(zip(order, _means(losses, counted), strict=True))
    seconds = (time.perf_counter() - started) / len(parts)
    return [Trained(after[client], LocalResult(means[client], steps[client], seconds)) for client in range(len(parts))]


def _means(losses: Sequence[Tensor], counted: NDArray[np.float64]) -> list[float]:
    """Return each client's mean of the losses of its steps; NaN where nothing was counted."""
    totals = torch.stack([nn.functional.pad(loss, (0, len(counted) - len(loss))) for loss in losses]).sum(0).tolist()
    return [total / count if count else math.nan for total, count in zip(totals, counted.tolist(), strict=True)]


def _regulariser(train: TrainConfig, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Return what adds FedProx's gradient to each client's, and clips each client's as a whole."""
    anchors = [parameter.detach().clone() for parameter in parameters] if train.proximal_mu else []

    def regularise() -> None:
        for parameter, anchor in zip(parameters, anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor[: len(parameter)], alpha=train.proximal_mu)
        if train.max_grad_norm:
            held = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in held]).norm(dim=0)  # (k,)
            factors = (train.max_grad_norm / (norms + CLIP_FLOOR)).clamp(max=1.0)
            for gradient in held:
                gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    return regularise
