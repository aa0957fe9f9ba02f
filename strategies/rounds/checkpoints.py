"""When the state of a run is saved, and what of it: so that who goes on from there gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedpeft.config import RunConfig, Scalar
from fedpeft.config.federation import MACHINE_KEYS
from fedpeft.runs import EVENTS, Checkpoint, RunDirectory
from fedpeft.strategies.rounds.memory import Memory
from fedpeft.strategies.rounds.watchers import Watcher

CLIENTS, CONFIG = "clients", "config"  # keys of a checkpoint's facts
# what a run that goes on may have another value of
FREE = (
    "federation.rounds",
    *(f"simulation.{key}" for key in MACHINE_KEYS),
    "run.checkpoint_every",
    "run.keep_checkpoints",
)


def lasting(config: RunConfig) -> dict[str, Scalar]:
    """Return the settings that stay as they are for as long as a run goes on, by key."""
    return {key: value for key, value in sorted(config.to_flat().items()) if key not in FREE}


class ClientStates(Protocol):
    """What clients keep from round to round, where that is on this side of the network."""

    def snapshot(self) -> Mapping[str, str]:
        """Return which version each client keeps now; these stay until `forget`."""

    def forget(self, kept: Iterable[Mapping[str, str]]) -> None:
        """Remove what no client needs now and none of these snapshots names."""


@dataclass(frozen=True)
class Resumed:
    """From where a run goes on.

    Parameters
    ----------
    checkpoint : Checkpoint
        The state that it goes on from.
    earlier : mapping of int to mapping
        What the checkpoints before it say of clients' states, by round.
    """

    checkpoint: Checkpoint
    earlier: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Held:
    """The state after a round that no checkpoint holds yet."""

    round: int
    memory: Memory
    events: int
    clients: Mapping[str, str]


class Checkpoints(Watcher):
    """Saves the state after each round that is due, one of every few and the last; at an early end, of the last one.

    Parameters
    ----------
    directory : RunDirectory
        Where to.
    every, last : int
        Rounds between checkpoints, and in all.
    memory : callable
        Gives the state of the rounds; its tensors are held, by reference, until they are saved or the next round is
        over.
    states : ClientStates, optional
        Of the clients of a simulation.
    facts : mapping
        What is saved besides.
    """

    def __init__(
        self,
        directory: RunDirectory,
        every: int,
        last: int,
        memory: Callable[[], Memory],
        states: ClientStates | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.every, self.last, self._memory = directory, every, last, memory
        self._states, self.facts = states, dict(facts or {})
        self._held: _Held | None = None
        self._clients: dict[int, Mapping[str, str]] = {}  # by round, of the checkpoints there are

    def goes_on(self, resumed: Resumed) -> Memory:
        """Know the checkpoints that are there already, and return the memory of that from which the run goes on."""
        checkpoint = resumed.checkpoint
        self._clients = {**resumed.earlier, checkpoint.round: checkpoint.facts[CLIENTS]}
        return Memory(checkpoint.tensors, checkpoint.facts)

    def round_closed(self, server_round: int) -> None:
        """Save the state if it is due, and else hold it."""
        clients = {} if self._states is None else self._states.snapshot()
        self._held = _Held(server_round, self._memory(), self.directory.events_size, clients)
        if server_round % self.every == 0 or server_round == self.last:
            self._save(self._held)
        else:
            self._forget()

    def ended(self, error: BaseException | None) -> None:
        """Save the state after the last round that was over, where no checkpoint holds it."""
        if self._held is not None and error is not None:  # else it was due, and there was no room for it
            self._save(self._held)

    def _save(self, held: _Held) -> None:
        facts = {**self.facts, **held.memory.facts, EVENTS: held.events, CLIENTS: held.clients}
        there = self.directory.checkpoint(held.round, held.memory.tensors, facts)
        self._clients[held.round] = held.clients
        self._clients = {number: clients for number, clients in self._clients.items() if number in there}
        if held.round in there:
            self._held = None
        self._forget()

    def _forget(self) -> None:
        """Let go of what clients kept after rounds that no checkpoint holds, nor the next one may."""
        if self._states is not None:
            rest = [] if self._held is None else [self._held.clients]
            self._states.forget([*self._clients.values(), *rest])
