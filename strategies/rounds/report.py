"""A round as the server sees it: whose answers count, in which order, and what is reported."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Message

from fedpeft.adapters.state import ClientUpdate
from fedpeft.errors import ConfigError


@dataclass(frozen=True)
class Fault:
    """A client whose answer does not count in a round, and why; whether because its code raised an exception."""

    client_id: str
    reason: str
    raised: bool = False


@dataclass
class RoundReport:
    """What happened in one round.

    Parameters
    ----------
    server_round : int
        From 1.
    updates : list of ClientUpdate
        The good ones without their tensors, in the order in which they were averaged.
    faults : list of Fault
        The others.
    bytes_up, bytes_down : int
        Array values sent by clients and to them.
    bytes_catch_up : int
        Those of `bytes_down` that say what became of the base before the last round: papers do not count them.
    seconds : float
        From the first message to the new adapter.
    exhausted : int
        Those of the faults that are clients whose privacy budget is spent.
    asked : Counter of str
        How often each client was asked to train, and may have.
    aggregation_error : float or None
        ``|DW - sent| / |DW - s B_t A_t|`` over all layers, where DW is the weighted mean of the clients' products, and
        B_t A_t what the round began with: relative to what the round was to change.
    aggregation_error_of_total : float or None
        The same distance, relative to all that has been learned since the run began.
    aggregation_error_layers : int or None
        On so many layers both were measured, where that is not all of them.
    """

    server_round: int
    updates: list[ClientUpdate] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_catch_up: int = 0
    seconds: float = 0.0
    exhausted: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    aggregation_error: float | None = None
    aggregation_error_of_total: float | None = None
    aggregation_error_layers: int | None = None

    @property
    def train_loss(self) -> float | None:
        """Mean of the clients' losses, weighted by their rows; None if a client reported none."""
        losses = [(update.metrics.loss, update.num_examples) for update in self.updates]
        if not losses or any(loss is None for loss, _ in losses):
            return None
        return sum(loss * rows for loss, rows in losses if loss is not None) / sum(rows for _, rows in losses)


def client_order(client_id: str) -> tuple[bool, int, str]:
    """Sort key of client ids: numbers by value, then names."""
    return (False, int(client_id), "") if client_id.isdecimal() else (True, 0, client_id)


def error_class(reason: str) -> str:
    """Return the class that a reply's reason speaks of, or what a site says: SuperNodes wrap it as in the pattern."""
    wrapped = re.fullmatch(r"<class '[\w.]+'>:<'(.+)'>", reason, re.DOTALL)
    return wrapped[1] if wrapped else reason


def require_enough(clients: int, min_clients: int) -> None:
    """Raise ConfigError if no round can have as many good updates as it must."""
    if min_clients > clients:
        raise ConfigError(
            f"federation.min_clients = {min_clients}, but there are {clients} clients; at most that many are allowed."
        )


def in_order(messages: Iterable[Message], replies: Iterable[Message]) -> Iterator[tuple[Message, Message | None]]:
    """Pair messages with their replies in the order of the messages; None where there is no reply.

    An ordered stream passes straight through; of an unordered one, early replies are held back.
    """
    early: dict[str, Message] = {}
    arriving = iter(replies)
    for message in messages:
        while message.metadata.message_id not in early or not message.metadata.message_id:
            reply = next(arriving, None)
            if reply is None:
                break
            early[reply.metadata.reply_to_message_id] = reply
        yield message, early.pop(message.metadata.message_id, None)
