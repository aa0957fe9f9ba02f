"""A method of one's own: clients count alike, however many rows they have.

    python examples/own_strategy.py

A package names it under the entry point group `fedpeft.strategies` instead, and every command knows it.
"""

from dataclasses import replace

from fedpeft import STRATEGIES, AdapterStrategy, configure, simulate
from fedpeft.strategies import Capabilities
from fedpeft.strategies.algebra.means import weighted_mean


class OneVote(AdapterStrategy):
    """The plain mean of A and of B over clients."""

    name = "one-vote"
    capabilities = Capabilities(paper="none", sends="Abar, Bbar", exact="no", needs_single_factors=False)

    def aggregate(self, updates, current, server_round=1):
        """Average as updates arrive, each with the weight of one row."""
        return weighted_mean((replace(update, num_examples=1) for update in updates), current)


STRATEGIES[OneVote.name] = OneVote
settings = {"strategy.name": "one-vote", "federation.rounds": 3, "simulation.workers": 0}
outcome = simulate(configure(settings, preset="digits"))
print(f"{OneVote.name}: accuracy {outcome.scores['accuracy']:.3f} after {outcome.rounds} rounds")
