"""How many bytes a round moves, by plan: a client of mean rank that missed no round, and whom nobody asks twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import AdapterState, Role, role_of
from fedpeft.config import RunConfig, cohort_size
from fedpeft.privacy.levels import level_of
from fedpeft.resident import Resident
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.registry import find
from fedpeft.strategies.rounds.exchange import Exchange, sent_down
from fedpeft.strategies.rounds.ranks import Ranks


def client_ranks(config: RunConfig) -> tuple[int, ...]:
    """Return the ranks that are dealt to clients; empty where all take what the method sends, whatever its rank."""
    facts = find(config.strategy.name).capabilities
    if not facts.mixed_ranks:
        return ()
    return config.adapter.ranks or (() if facts.changes_rank else (config.adapter.rank,))


def volume(config: RunConfig, home: Resident, server_round: int) -> tuple[int, int]:
    """Return the bytes that one client sends and is sent in a round, without catching up on a base that moves.

    Parameters
    ----------
    config : RunConfig
        With typed options.
    home : Resident
        Its adapter and clients.
    server_round : int
        From 1.
    """
    adapted, clients = home.adapted, home.partition.client_ids
    method = find(config.strategy.name)
    names = [name for name in adapted.initial if name not in adapted.personal]
    ranks = _dealt(config, clients)
    up = _volume(adapted, method.exchange(server_round).sent_up(names, adapted.frozen), ranks)
    down = _volume(adapted, sent_down(_exchange(config, method), names, adapted.frozen, server_round), ranks)
    if method.capabilities.controls:  # the server's control variate is as large as what clients send up
        down += up
    if server_round > 1 and not any(role_of(name) is Role.A for name in adapted.frozen):  # else a mean is exact
        down += _step(method, adapted, ranks[: cohort_of(config, home)])
    return up, down


def cohort_of(config: RunConfig, home: Resident) -> int:
    """Return how many clients are drawn each round."""
    federation = config.federation
    return cohort_size(len(home.partition.client_ids), federation.fraction, federation.min_clients)


def _exchange(config: RunConfig, method: type[AdapterStrategy]) -> Callable[[int], Exchange]:
    """Return what each round exchanges, as `fedpeft.strategies.rounds.outgoing.Outgoing` has it."""
    if level_of(config.privacy).hides_cohort:
        return lambda server_round: method.exchange(server_round).forgotten()
    return method.exchange


def _dealt(config: RunConfig, clients: Sequence[str]) -> list[int]:
    """Return the rank of each client."""
    ranks = Ranks(client_ranks(config) or (config.adapter.rank,), config.adapter.scaling_of)
    ranks.deal(clients)
    return list(ranks.of.values())


def _volume(adapted: AdaptedModel, names: Iterable[str], ranks: Sequence[int]) -> int:
    """Return the bytes of these tensors for a client of mean rank."""
    share = sum(ranks) / len(ranks) / max(ranks)
    total = 0.0
    for name in names:
        size = adapted.initial[name].numel() * adapted.initial[name].element_size()
        total += size * share if role_of(name) in (Role.A, Role.B) else size
    return round(total)


def _step(method: type[AdapterStrategy], adapted: AdaptedModel, ranks: Sequence[int]) -> int:
    """Return the bytes of a round's change of the base."""
    factors = AdapterState.from_tensors(adapted.initial, adapted.scaling).factors
    return sum(4 * method.step_size(f.A.shape[1], f.B.shape[0], ranks) for f in factors.values())
