"""Clients whose updates are of known lengths, and the clipped mean of them that anyone can read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from fedpeft.privacy.client_mechanism import ClientPrivacy
from fedpeft.strategies import FedIt
from fedpeft.strategies.averaging.private_mean import (
    update_norm,
)
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.rounds.report import RoundReport
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.wire import TrainOrder, to_record, to_tensors
from tests.strategies.test_base import Client, FunctionGrid, Reports, ids, initial, reply_with

ABLE = ["fedit", "rolora", "fedsa-lora", "fedsvd", "fed-sb", "frlora"]
SILENT = ClientPrivacy(0.0, clip=1.0)  # clips, and adds no noise


def start() -> dict[str, Tensor]:
    """Return an adapter of layers that are not square, in float64."""
    return {name: tensor.double() for name, tensor in initial().items()}


def change(node: int, length: float) -> dict[str, Tensor]:
    """Return what a client of this number changes, of some length over all tensors."""
    draw = torch.Generator().manual_seed(node)
    drawn = {name: torch.randn(t.shape, generator=draw, dtype=torch.float64) for name, t in start().items()}
    return {name: t * (length / update_norm(drawn)) for name, t in drawn.items()}


def moving(node: int, length: float, examples: int = 1) -> Client:
    """Make a client that adds its change to whatever it is sent."""

    def client(message: Message) -> Message:
        sent = to_tensors(TrainOrder.from_record(message.content).arrays)
        moved = {name: tensor + change(node, length)[name].to(tensor) for name, tensor in sent.items()}
        return reply_with(message, moved, examples)

    return client


def run(
    clients: dict[int, Client],
    privacy: ClientPrivacy | None = SILENT,
    rounds: int = 1,
    method: type[AdapterStrategy] = FedIt,
    begin: Mapping[str, Tensor] | None = None,
    reverse: bool = False,
    watchers: Iterable[Watcher] = (),
    **options: Any,
) -> tuple[dict[str, Tensor], list[RoundReport], AdapterStrategy]:
    reports: list[RoundReport] = []
    strategy = method(client_privacy=privacy, client_ids=ids(len(clients)), **options)
    result = strategy.start(
        FunctionGrid(clients, reverse),
        to_record(start() if begin is None else begin),
        rounds,
        watchers=[Reports(reports), *watchers],
    )
    return to_tensors(result.arrays), reports, strategy


def clipped_mean(
    lengths: Mapping[int, float], divisor: float, bound: float, frozen: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return x_0 + sum_k clip(u_k) / m, client by client and number by number."""
    after = start()
    trained = [name for name in after if name not in frozen]
    for node, length in lengths.items():
        sent = {name: tensor for name, tensor in change(node, length).items() if name in trained}
        norm = math.sqrt(sum(float(number) ** 2 for tensor in sent.values() for number in tensor.flatten()))
        for name, tensor in sent.items():
            after[name] = after[name] + tensor * min(1.0, bound / norm) / divisor
    return after
