"""What the machinery asks of a method; `fedpeft.strategies.base.AdapterStrategy` says what each of it means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.errors import ConfigError
from fedpeft.strategies.capabilities import Capabilities
from fedpeft.strategies.rounds.exchange import Exchange
from fedpeft.strategies.rounds.terms import RunTerms


class Method(Protocol):
    """A federated method, ready for a run on its terms."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    terms: RunTerms
    options: Any

    @classmethod
    def exchange(cls, server_round: int) -> Exchange: ...  # noqa: D102

    @classmethod
    def needs_singles(cls, options: Any) -> str: ...  # noqa: D102

    @classmethod
    def check_cohort(cls, options: Any, clients: int) -> None: ...  # noqa: D102

    def aggregate(  # noqa: D102
        self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1
    ) -> AdapterState: ...

    def view(self, state: AdapterState, rank: int, scaling: float) -> AdapterState: ...  # noqa: D102

    def accepted_ranks(self, rank: int) -> tuple[int, ...]: ...  # noqa: D102

    def client_settings(self, rank: int) -> Mapping[str, float]: ...  # noqa: D102

    def memory(self) -> dict[str, Tensor]: ...  # noqa: D102


def obstacle_to_sums(method: type[Method]) -> str:
    """Say why a method cannot work on a noised sum, whatever its options; empty if it can."""
    facts, first = method.capabilities, method.exchange(1)
    if facts.needs_single_factors:
        return (
            f"its server must see each client's factors to send {facts.sends}, and the noise is on the sum of the "
            "updates alone, of which sums of products such as sum_k p_k B_k A_k are no function"
        )
    if first.trained <= first.personal:
        return "its clients send nothing, so that there is no sum to add noise to"
    return ""


def require_sums(
    method: type[Method], options: Any, ranks: Sequence[int] = (), methods: Mapping[str, type[Method]] | None = None
) -> None:
    """Raise ConfigError unless a method can work on the noised sum of the clients' updates alone.

    Parameters
    ----------
    method : type
        A strategy.
    options : StrategyOptions
        The method's.
    ranks : sequence of int
        Of the clients.
    methods : mapping of str to type, optional
        All that there are, of which the error names those that can.
    """
    if why := obstacle_to_sums(method):
        able = ", ".join(name for name, other in (methods or {}).items() if not obstacle_to_sums(other))
        raise ConfigError(
            f"strategy '{method.name}' is not for privacy.level = 'client': {why}. "
            f"Use one of {able or 'those that work on sums only (`fedpeft strategies`)'}, or another privacy.level"
        )
    if option := method.needs_singles(options):
        raise ConfigError(
            f"strategy.{option} is not for privacy.level = 'client': it compares single clients' updates, "
            "and the noise is on their sum. Leave it unset; privacy.max_update_norm bounds each client already"
        )
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"adapter.ranks = {','.join(map(str, ranks))} is not for privacy.level = 'client': updates of different "
            "ranks have no sum that noise could be added to. Give all clients one adapter.rank"
        )
