"""What travels in a round: which tensors clients train, keep and send, and which of them a client still lacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedpeft.adapters.state import Role, fingerprint, role_of

EVERYTHING = frozenset(Role) - {Role.BASE}  # what clients may train


@dataclass(frozen=True)
class Exchange:
    """What the clients of one round do with each kind of tensor; a method declares it, and messages carry it.

    Parameters
    ----------
    trained : frozenset of Role
        What is trained, unless the run's configuration freezes it. What is trained and not personal is sent up.
    personal : frozenset of Role
        What never leaves the client, nor is ever sent to it.
    kept : frozenset of Role
        What a client keeps from round to round, so that it is sent again only after it has changed.
    refactored : frozenset of Role
        What the server changes after the round though no client trained it.
    drawn : frozenset of Role
        What the round begins with as drawn from the run's seed, by each client itself, so that it is not sent.
    draw : int
        Which draw that is: 0 is the adapter as the run began with it, another number one of `fedpeft.adapters.draws`.
    """

    trained: frozenset[Role] = EVERYTHING
    personal: frozenset[Role] = frozenset()
    kept: frozenset[Role] = frozenset()
    refactored: frozenset[Role] = frozenset()
    drawn: frozenset[Role] = frozenset()
    draw: int = 0

    def forgotten(self) -> Exchange:
        """Return the same round with clients that keep nothing to the next: what they keep would show who took part."""
        return replace(self, kept=frozenset())

    def sent_up(self, names: Collection[str], frozen: Collection[str]) -> list[str]:
        """Return those of `names` that a client sends back; `frozen` ones are trained by nobody."""
        sent = self.trained - self.personal
        return [name for name in names if role_of(name) in sent and name not in frozen]


def sent_down(
    exchange: Callable[[int], Exchange], names: Collection[str], frozen: Collection[str], server_round: int
) -> list[str]:
    """Return what a client that missed no round is sent in a round, by plan; `Deliveries` decides it in fact.

    Changes of the base are not among the names: see `fedpeft.strategies.base.AdapterStrategy.step_size`.

    Parameters
    ----------
    exchange : callable
        Of each round, from 1.
    names, frozen : collection of str
        All tensors of the adapter, and those that nobody trains.
    server_round : int
        From 1.
    """
    if server_round == 1:
        return exchange(1).sent_up(names, frozen)
    now = exchange(server_round)
    earlier = [exchange(number) for number in range(1, server_round)]
    changed = [(each.trained - each.personal) | each.refactored for each in earlier]
    ever: frozenset[Role] = frozenset().union(*changed)
    roles = ((ever - now.kept) | (changed[-1] & now.kept)) - now.personal - now.drawn
    return [name for name in names if role_of(name) in roles and name not in frozen]


class Deliveries:
    """Which version of each tensor every client is known to hold, so that it is sent only what it lacks.

    At first a client holds what it draws from the run's seed; what the first round trains is sent all the same. A
    client that turns out to hold something else says so, and is sent everything.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        The whole adapter as drawn from the seed.
    first : Exchange
        Of the first round.
    frozen : collection of str
        Names that nobody trains.
    """

    def __init__(self, tensors: Mapping[str, Tensor], first: Exchange, frozen: Collection[str]) -> None:
        self._tensors = dict(tensors)
        self._versions = dict.fromkeys(tensors, 0)
        trained = set(first.sent_up(list(tensors), frozen))
        self._drawn = {name: 0 for name in tensors if name not in trained and role_of(name) is not Role.BASE}
        self._known: dict[str, dict[str, int]] = {}
        self._hashes: dict[frozenset[str], str] = {}

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors that the next round starts from."""
        for name, tensor in tensors.items():
            before = self._tensors.get(name)
            if before is None or (
                before is not tensor and not (before.shape == tensor.shape and torch.equal(before, tensor))
            ):
                self._versions[name] = self._versions.get(name, 0) + 1
        self._tensors = dict(tensors)
        self._hashes.clear()

    def lacking(self, client: str, exchange: Exchange) -> list[str]:
        """Return the names of the tensors to send to a client."""
        known = self._known.get(client, self._drawn)
        return [
            name
            for name in self._shared(exchange)
            if known.get(name) != self._versions[name] and role_of(name) not in exchange.drawn
        ]

    def held_hash(self, sent: Collection[str], exchange: Exchange) -> str:
        """Return the fingerprint of what a client is expected to hold besides what it is sent; empty for nothing."""
        held = frozenset(self._shared(exchange)).difference(sent)
        if held not in self._hashes:
            self._hashes[held] = fingerprint({name: self._tensors[name] for name in held}) if held else ""
        return self._hashes[held]

    def holds_others(self, client: str, exchange: Exchange) -> list[str]:
        """Note that a client does not hold what it should, and return everything that it must be sent."""
        self._known[client] = {}
        return self._shared(exchange)

    def delivered(self, client: str, sent: Collection[str], exchange: Exchange) -> None:
        """Note that a client has trained with what it was sent, and keeps what it is asked to keep."""
        known = self._known.setdefault(client, dict(self._drawn))
        known |= {name: self._versions[name] for name in sent if role_of(name) in exchange.kept}

    def memory(self) -> dict[str, Any]:
        """Return what is known of clients, as plain JSON; those who hold the same are named together.

        Who holds what it drew, as everybody does who was never asked, is not named.
        """
        alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for client, known in self._known.items():
            if known == self._drawn:
                continue
            alike.setdefault(tuple(sorted(known.items())), []).append(client)
        groups = [{"versions": dict(versions), "clients": sorted(alike[versions])} for versions in sorted(alike)]
        return {"versions": dict(self._versions), "drawn": dict(self._drawn), "known": groups}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take up what `memory` returned, where the adapter is the same."""
        self._versions, self._drawn = dict(memory["versions"]), dict(memory["drawn"])
        self._known = {client: dict(alike["versions"]) for alike in memory["known"] for client in alike["clients"]}
        self._hashes.clear()

    def _shared(self, exchange: Exchange) -> list[str]:
        return [name for name in self._tensors if role_of(name) not in exchange.personal]
