"""What a step is made of besides its gradient: the learning rate, the optimiser, what is added, the loss's scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedpeft.adapters.state import Role, role_of
from fedpeft.config import TrainConfig
from fedpeft.deferred import installed
from fedpeft.errors import AdapterError
from fedpeft.training.optimizers import OPTIMIZERS, SCHEDULES

T = TypeVar("T")
RATIO = "rate_ratio"  # key of a parameter group: what the step's learning rate is multiplied with
LEAST_SCALE = 1.0  # of a loss in fp16; what overflows without any is no matter of scale


def warmup_steps(warmup: float, total: int) -> int:
    """Return over how many of all rounds' steps the learning rate rises: a share below 1, else steps."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def learning_rate(train: TrainConfig, server_round: int, num_rounds: int, *, step: int, steps: int) -> float:
    """Return the size of a step.

    With W warm-up steps, step i of all T steps of all rounds has, of the peak rate, (i + 1) / W while i < W, and then
    what the schedule says of (i - W) / (T - W), between peak and minimum: transformers' schedules, but that these begin
    at 0 / W, which would pay for a step, and perhaps for a round, that moves nothing.

    Parameters
    ----------
    train : TrainConfig
        How.
    server_round, num_rounds : int
        Place of the round, from 1.
    step, steps : int
        Place of the step in its round, from 0.
    """
    schedule = SCHEDULES.find(train.lr_schedule)
    done, total = (server_round - 1) * steps + step, num_rounds * steps
    rising = warmup_steps(train.warmup, total)
    if done < rising:
        return train.learning_rate * (done + 1) / rising
    if schedule.by_round:
        progress = server_round / num_rounds
    elif rising:
        progress = (done - rising) / max(total - rising, 1)
    else:
        progress = (server_round - 1 + step / steps) / num_rounds
    least = train.min_learning_rate
    return least + (train.learning_rate - least) * schedule.factor(progress)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step be of this size, in each group times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATIO, 1)


def make_optimizer(train: TrainConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return the configured optimiser of the live parameters, by their names in the adapter.

    Raises
    ------
    AdapterError
        It steps factors A and B together, and a layer has not both among the parameters; or factors B are to have a
        learning rate of their own, and there are none; or the optimiser's package is not installed.
    """
    check_optimizer(train, parameters)
    optimizer = OPTIMIZERS.find(train.optimizer).build(parameters, train.learning_rate, train.options)
    if train.lora_plus_ratio != 1:
        factors = {id(parameter) for name, parameter in parameters.items() if role_of(name) is Role.B}
        _set_apart(optimizer, factors, train.lora_plus_ratio)
    return optimizer


def check_optimizer(train: TrainConfig, names: Iterable[str]) -> None:
    """Raise AdapterError, see `make_optimizer`, where these tensors cannot be trained as configured."""
    record, names = OPTIMIZERS.find(train.optimizer), list(names)
    if record.needs and not installed(record.needs):
        raise AdapterError(
            f"train.optimizer = '{record.name}' needs {record.needs}, which is not installed: "
            f"pip install 'fedpeft[{record.extra}]'"
        )
    if record.needs_pairs and not _in_pairs(names):
        raise AdapterError(
            f"train.optimizer = '{record.name}' steps both factors of a layer together, and here one of them is not "
            "trained. Use an adapter and a strategy that train both, such as the defaults, or another optimizer."
        )
    if train.lora_plus_ratio != 1 and not any(role_of(name) is Role.B for name in names):
        raise AdapterError(
            f"train.lora_plus_ratio = {train.lora_plus_ratio:g} is of the learning rate of factors B, and here none is "
            "trained. Use an adapter.kind that has them, such as lora, or leave it at 1."
        )


def _in_pairs(names: Iterable[str]) -> bool:
    of_role = {role: {name.replace(f"lora_{role}", "") for name in names if role_of(name) == role} for role in "AB"}
    return bool(of_role["A"]) and of_role["A"] == of_role["B"]


def _set_apart(optimizer: torch.optim.Optimizer, chosen: set[int], ratio: float) -> None:
    """Give parameters groups of their own; their order stays, by which private training hands out its noise."""
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for apart, members in itertools.groupby(group["params"], lambda parameter: id(parameter) in chosen):
            own = {**group, "params": list(members)}
            optimizer.add_param_group({**own, RATIO: ratio} if apart else own)


@dataclass(frozen=True)
class Additions:
    """What comes on top of a step's gradient, besides FedProx: none of it depends on a row.

    Parameters
    ----------
    penalty : callable, optional
        What to add to each step's loss; not part of the loss that is reported.
    correction : mapping of str to Tensor
        What is added to each step's gradient of the tensors of these names, last of all: not clipped, as in SCAFFOLD,
        y <- y - lr (g - c_i + c) with the correction c - c_i (S. P. Karimireddy et al., ICML 2020, arXiv 1910.06378).
    """

    penalty: Callable[[], Tensor] | None = None
    correction: Mapping[str, Tensor] = field(default_factory=dict)


def regulariser(train: TrainConfig, parameters: Mapping[str, nn.Parameter], additions: Additions) -> Callable[[], None]:
    """Return what adds the penalty's gradient and FedProx's to a step's, clips it, and corrects it.

    Parameters
    ----------
    train : TrainConfig
        Names mu and the largest norm.
    parameters : mapping of str to Parameter
        What is trained, as it is when the round begins.
    additions : Additions
        See there.
    """
    held = list(parameters.values())
    start = [parameter.detach().clone() for parameter in held] if train.proximal_mu else []
    corrected = [(parameters[name], own.to(parameters[name].detach())) for name, own in additions.correction.items()]

    def regularise() -> None:
        if additions.penalty is not None:
            additions.penalty().backward()  # type: ignore[no-untyped-call]
        for parameter, anchor in zip(held, start, strict=False):
            # FedProx: the gradient of mu/2 |w - w_global|^2
            if parameter.grad is not None:  # else the loss does not depend on it, and it has not moved
                parameter.grad.add_(parameter.detach() - anchor, alpha=train.proximal_mu)
        if train.max_grad_norm:
            nn.utils.clip_grad_norm_(held, train.max_grad_norm)
        for parameter, own in corrected:
            parameter.grad = own.clone() if parameter.grad is None else parameter.grad.add_(own)

    return regularise


def loss_scaler(train: TrainConfig, on: torch.device) -> torch.amp.GradScaler | None:
    """Return what scales a round's losses, so that gradients in fp16 do not vanish; None in other precisions."""
    return torch.amp.GradScaler(on.type) if train.precision == "fp16" else None


def take_step(
    optimizer: torch.optim.Optimizer,
    compute: Callable[[], T],
    regularise: Callable[[], None],
    scaler: torch.amp.GradScaler | None = None,
) -> T:
    """Make one step, and return what `compute` did.

    A gradient that overflows in fp16 moves nothing and halves the scale. Since scales begin afresh in each round, whose
    steps are few, the same batch is then computed again, until it fits or there is no scale left.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Makes the step.
    compute : callable
        Leaves the gradient in ``.grad``; of the scaled loss, where there is a scaler.
    regularise : callable
        What is done to the gradient after that.
    scaler : torch.amp.GradScaler, optional
        Of the losses.
    """
    while True:
        optimizer.zero_grad(set_to_none=True)
        found = compute()
        if scaler is None:
            regularise()
            optimizer.step()
            return found
        scaler.unscale_(optimizer)
        regularise()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() >= before or before <= LEAST_SCALE:
            return found
