"""FedSA-LoRA: A is shared, B stays with its client.

P. Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv 2410.01463. Clients train
both factors and send A alone; the server sends

    Abar = sum_k p_k A_k,

and client k goes on from (Abar, B_k). A is found to hold what clients have in common, B what is their own. So there is
one model a client and no global one: a run's score is the mean over the personal models, and what a client has not
trained yet is the B that all start from. The classifier head is each client's own too, as in the authors' code, unless
``adapter.head`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedpeft.adapters.state import AdapterState, ClientUpdate, Role
from fedpeft.config import AdapterConfig
from fedpeft.errors import ConfigError
from fedpeft.strategies.averaged import AveragingStrategy
from fedpeft.strategies.base import StrategyOptions
from fedpeft.strategies.capabilities import Capabilities, Merging
from fedpeft.strategies.rounds.exchange import Exchange


class FedSaLora(AveragingStrategy):
    """The weighted mean of A; B is personal (arXiv 2410.01463)."""

    name = "fedsa-lora"
    capabilities = Capabilities(
        paper="arXiv 2410.01463",
        sends="Abar",
        exact="does not apply: there is no global update",
        needs_single_factors=False,
        personal=frozenset({Role.B}),
        head="local",
        merging=Merging(refused="leaves each client its own B, so that there is no one adapter to write"),
    )

    @classmethod
    def check(cls, options: StrategyOptions, adapter: AdapterConfig) -> None:
        """Raise ConfigError if A is frozen: nothing would be left to share."""
        if Role.A in adapter.facts.fixed:
            raise ConfigError(
                f"strategy 'fedsa-lora' shares A, which adapter.kind = '{adapter.kind}' freezes; "
                "use adapter.kind = 'lora'"
            )

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Train everything, and leave B where it is."""
        return Exchange(personal=cls.capabilities.personal)

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average A as it arrives."""
        return self.average(updates, current, trains_b=False)
