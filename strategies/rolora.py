"""RoLoRA: A and B by turns, so that every round's mean of products is the product of means.

S. Chen et al., "Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA",
arXiv 2409.02346; longer, as "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
arXiv 2502.01755, NeurIPS 2025. On odd rounds clients share A, train B, and the server sends

    Bbar = sum_k p_k B_k;    on even rounds they share B and train A:    Abar = sum_k p_k A_k.

With A_k = A for all k, sum_k p_k B_k A_k = Bbar A exactly, and likewise with B. Unlike FFA-LoRA, A is learnt too.

Each way, a round moves the trained factor alone: a client keeps the other, and is sent it again only if it has missed
the round that changed it.
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

FACTORS = frozenset({Role.A, Role.B})


def trained_factor(server_round: int) -> Role:
    """Return B on odd rounds, A on even ones; at first B is zero, where A has no gradient."""
    return Role.B if server_round % 2 else Role.A


class RoLora(AveragingStrategy):
    """B on odd rounds and A on even ones, averaged (arXiv 2409.02346)."""

    name = "rolora"
    capabilities = Capabilities(
        paper="arXiv 2409.02346",
        sends="Bbar on odd rounds, Abar on even ones",
        exact="always: the other factor is shared",
        needs_single_factors=False,
        trains="B, A in turn",
        merging=Merging(
            refused="trains A and B by turns while all clients share the other one, and adapters on disk share neither"
        ),
    )

    @classmethod
    def check(cls, options: StrategyOptions, adapter: AdapterConfig) -> None:
        """Raise ConfigError if A is frozen for good."""
        if Role.A in adapter.facts.fixed:
            raise ConfigError(
                f"strategy 'rolora' trains A on even rounds, which adapter.kind = '{adapter.kind}' freezes; "
                "use adapter.kind = 'lora', or a strategy that trains B alone"
            )

    @classmethod
    def exchange(cls, server_round: int) -> Exchange:
        """Train one factor, and keep both."""
        return Exchange(trained=frozenset({trained_factor(server_round), Role.HEAD}), kept=FACTORS)

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average the factor that the round trained as it arrives."""
        trained = trained_factor(server_round)
        return self.average(updates, current, trains_a=trained is Role.A, trains_b=trained is Role.B)
