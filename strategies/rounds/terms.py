"""On which terms the rounds of a run are held, whatever the method: who takes part, and what its adapter is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedpeft.adapters.state import A_SUFFIX, LoraFactors
from fedpeft.privacy.client_mechanism import ClientPrivacy


@dataclass(frozen=True)
class RunTerms:
    """What a method and the loop of its rounds are told of a run; nothing in it changes from round to round.

    Parameters
    ----------
    fraction_train : float
        Share of the clients drawn each round, without replacement.
    min_clients : int
        Fewest good updates that make a round.
    seed : int
        The run's seed.
    scaling : float
        alpha / r of the clients' adapters.
    frozen : collection of str
        Names in the initial arrays that nobody trains, such as FFA-LoRA's A: only their hash travels, unless a client
        turns out to have drawn others.
    client_ids : mapping of int to str
        Client id of each node; nodes that are not in it are asked once by a ``query`` message.
    measure_error : bool
        Whether to compute the aggregation error, which keeps all the cohort's factors until the end of the round.
    ranks : sequence of int
        Ranks of the clients, dealt in turn, where they differ; see `fedpeft.strategies.rounds.ranks`.
    scaling_of : callable, optional
        Scaling of a client of some rank; ``alpha / rank``, with the alpha that `scaling` speaks of, if not given.
    offset : mapping of str to LoraFactors
        By layer, what the initialisation put into the adapter and took out of the base; see
        `fedpeft.adapters.adapted.AdaptedModel`.
    client_privacy : ClientPrivacy, optional
        Clips the clients' updates and adds noise to their sum, see `.averaging.private_mean`; what single
        clients report is then told to nobody, and `min_clients` must only exist, not answer.
    stop_when_spent : bool
        Whether a client whose privacy budget is spent ends the run; else it goes on without it.
    """

    fraction_train: float = 1.0
    min_clients: int = 1
    seed: int = 0
    scaling: float = 1.0
    frozen: Collection[str] = ()
    client_ids: Mapping[int, str] = field(default_factory=dict)
    measure_error: bool = True
    ranks: Sequence[int] = ()
    scaling_of: Callable[[int], float] | None = None
    offset: Mapping[str, LoraFactors] = field(default_factory=dict)
    client_privacy: ClientPrivacy | None = None
    stop_when_spent: bool = False

    @property
    def trains_a(self) -> bool:
        """Whether A is trained, or frozen and the same at all clients."""
        return not any(name.endswith(A_SUFFIX) for name in self.frozen)

    def scaling_at(self, rank: int) -> float:
        """Return what a client of a rank multiplies its product with; rank 0 is the adapter's own."""
        if not rank or not self.ranks:
            return self.scaling
        return self.scaling * max(self.ranks) / rank if self.scaling_of is None else self.scaling_of(rank)
