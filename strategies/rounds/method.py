"""What the machinery asks of a method; `fedpeft.strategies.base.AdapterStrategy` says what each of it means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.strategies.rounds.exchange import Exchange
from fedpeft.strategies.rounds.terms import RunTerms


class Described(Protocol):
    """What the machinery asks of a method's record; see `fedpeft.strategies.capabilities.Capabilities`."""

    @property
    def changes_base(self) -> bool: ...  # noqa: D102


class Method(Protocol):
    """A federated method, ready for a run on its terms."""

    name: ClassVar[str]
    terms: RunTerms
    options: Any
    clients: int

    @property
    def capabilities(self) -> Described: ...  # noqa: D102

    @classmethod
    def exchange(cls, server_round: int) -> Exchange: ...  # noqa: D102

    @classmethod
    def check_cohort(cls, options: Any, clients: int) -> None: ...  # noqa: D102

    def aggregate(  # noqa: D102
        self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1
    ) -> AdapterState: ...

    def view(self, state: AdapterState, rank: int, scaling: float) -> AdapterState: ...  # noqa: D102

    def accepted_ranks(self, rank: int) -> tuple[int, ...]: ...  # noqa: D102

    def client_settings(self, rank: int) -> Mapping[str, float]: ...  # noqa: D102

    def control(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]: ...  # noqa: D102

    def control_made_in(self, client: str) -> int: ...  # noqa: D102

    def memory(self) -> dict[str, Tensor]: ...  # noqa: D102

    def recall(self, memory: Mapping[str, Tensor]) -> None: ...  # noqa: D102
