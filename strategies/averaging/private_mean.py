"""Privacy of clients: each update clipped to one norm, and Gaussian noise on their sum.

H. B. McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963. The server is
trusted with single updates; what follows is all that it releases. With x_0 what the clients of a round were sent and
u_k = x_k - x_0 what client k changed, over ALL tensors that it sends, factors and head as one vector,

    c_k = u_k min(1, S / |u_k|),    x = x_0 + (sum_k c_k + N(0, (z Delta)^2 I)) / m,

each client alike whatever its rows. m is PUBLIC: the expected cohort q N of a Poisson cohort, which each of N clients
joins by its own coin of chance q, or the size of a fixed one. It is never the number that answered: a client that
failed, was refused or kept silent counts as zero, and a round of an empty cohort is noise.

- ``poisson``: the neighbour of a run is one in which one client never answers, so that Delta = S. Who is drawn stays
  secret, which amplifies privacy. N, the number of clients that the server knows, is public.
- ``fixed``: the neighbour is one in which one client's answers are others, so that Delta = 2 S. Every client is taken
  to be in every round: no amplification.

A method then sees ONE client, which sends x: all that it makes of it is post-processing. So client privacy is for
methods whose server needs sums over clients (`require_sums`). Where both factors of a layer are in x, their product has
the noise of both, and its square; where one is frozen or shared in a round (``adapter.kind = "ffa-lora"``, rolora,
fedsvd), the noise stays linear.

Adaptive clipping is that of G. Andrew et al., "Differentially Private Learning with Adaptive Clipping",
arXiv 1905.03871. S follows the quantile g of the norms |u_k|, of which the server releases a noised count:

    b_k = 1[|u_k| <= S] - 1/2,    b = (sum_k b_k + N(0, (f sigma_b)^2)) / m + 1/2,    S <- S exp(-eta (b - g)),

with f = 1 for a Poisson cohort and 2 for a fixed one. The two releases together are one Gaussian mechanism of noise
multiplier z. Divide each by the standard deviation of its noise: both are then one vector with noise N(0, I), whose
sensitivity alone matters. A client moves the sum by at most Delta = f S, under noise z_delta f S, and the count by at
most f / 2 (zero to +-1/2; or -1/2 to +1/2), under noise f sigma_b. The vector thus moves by at most

    (1 / z_delta^2 + 1 / (2 sigma_b)^2)^(1/2) = 1 / z    for    z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2),

for both kinds of cohort, and for 2 sigma_b > z only. As both come from one draw of the cohort, they are also one step
to the amplification.

What differs from the papers: the factor 2 of a fixed cohort, which Andrew et al. do not need as they add and remove;
and S stays within 10^-6 to 10^6 times what it began with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.errors import ConfigError
from fedpeft.privacy.client_mechanism import AdaptiveClipping, ClientPrivacy
from fedpeft.privacy.randomness import Randomness, secure, seeded

NAME = "private mean"  # of the one client that a method sees
CLIP = "client_privacy.clip"  # in a checkpoint
CLIP_RANGE = 1e6  # how far S may move from what it began with, as a factor


class Summing(Protocol):
    """What is asked of a method, of a strategy's class as a rule, before it is given a noised sum."""

    @property
    def name(self) -> str:
        """By which users call it."""

    @property
    def capabilities(self) -> Any:
        """Its record, see `fedpeft.strategies.capabilities`."""

    def exchange(self, server_round: int) -> Any:
        """Say what clients train and send, see `fedpeft.strategies.rounds.exchange`."""

    def needs_singles(self, options: Any) -> str:
        """Return the option that compares single clients' updates, as ``key = value``, if any."""


def require_sums(method: Summing, options: Any, ranks: Sequence[int] = (), able: Iterable[Summing] = ()) -> None:
    """Raise ConfigError unless a method can work on the noised sum of the clients' updates alone.

    Parameters
    ----------
    method : Summing
        A strategy.
    options : StrategyOptions
        The method's.
    ranks : sequence of int
        Of the clients.
    able : iterable of Summing
        Strategies of which an error names those that can.
    """
    if why := _obstacle(method):
        names = ", ".join(other.name for other in able if not _obstacle(other))
        use = f"one of {names}" if names else "a strategy whose server needs sums of updates alone"
        raise ConfigError(
            f"strategy '{method.name}' is not for privacy.level = 'client': {why}. Use {use}, or another privacy.level"
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


def _obstacle(method: Summing) -> str:
    """Say why a method cannot work on a noised sum, whatever its options; empty if it can."""
    facts, first = method.capabilities, method.exchange(1)
    if facts.needs_single_factors:
        return (
            f"its server must see each client's factors to send {facts.sends}, and the noise is on the sum of the "
            "updates alone, of which sums of products such as sum_k p_k B_k A_k are no function"
        )
    if facts.controls:
        return (
            "its clients' control variates are a second sum over clients in each round, and who has one tells who took "
            "part; the noise is on the sum of the updates alone"
        )
    if first.trained <= first.personal:
        return "its clients send nothing, so that there is no sum to add noise to"
    return ""


def update_norm(change: Mapping[str, Tensor]) -> float:
    """Return |u| over all tensors as one vector; infinity where float64 cannot hold it."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor.to(torch.float64))) for tensor in change.values()))


def clip_factor(norm: float, bound: float) -> float:
    """Return min(1, S / |u|), which is 1 for an update of zero."""
    return 1.0 if norm <= bound else bound / norm


class PrivateMean:
    """A run's rounds of the mechanism: who is drawn, what is released, and the clipping norm meanwhile.

    Parameters
    ----------
    privacy : ClientPrivacy
        The mechanism.
    seed : int
        The run's, for ``rng = "seeded"``.

    Attributes
    ----------
    clip : float
        S of the next round to be merged.
    expected : float
        m of the last round drawn.
    """

    def __init__(self, privacy: ClientPrivacy, seed: int) -> None:
        self.privacy = privacy
        self.clip = privacy.clip
        self.expected = 1.0
        self._seed = seed

    def draw(self, clients: Sequence[str], fraction: float, server_round: int) -> list[str]:
        """Let each client join a Poisson cohort by its own coin, and expect ``fraction * len(clients)`` of them.

        Parameters
        ----------
        clients : sequence of str
            All that there are, in their order.
        fraction : float
            q.
        server_round : int
            From 1.

        Returns
        -------
        list of str
            In the order of `clients`; may be empty.
        """
        self.expected = fraction * len(clients)
        coins = self._randomness("cohort", server_round).uniform(len(clients))
        return [client for client, coin in zip(clients, coins, strict=True) if coin < fraction]

    def as_one_client(
        self, updates: Iterable[ClientUpdate], current: AdapterState, names: Sequence[str], server_round: int
    ) -> ClientUpdate:
        """Return the private mean as the update of one client, which a method merges as it would any other.

        Parameters
        ----------
        updates : iterable of ClientUpdate
            The good ones; consumed once, one of them held at a time. They may be none.
        current : AdapterState
            What the round started from, x_0.
        names : sequence of str
            The tensors that clients send, by PEFT's names.
        server_round : int
            From 1.
        """
        held = current.adapter_tensors()
        mean = self.merge(_tensors(updates), {name: held[name] for name in names}, server_round)
        state = AdapterState.from_tensors({**held, **mean}, scaling=1.0)
        factors = {layer: replace(f, scaling=current.factors[layer].scaling) for layer, f in state.factors.items()}
        dense = {name: tensor for name, tensor in state.dense.items() if name in mean}
        return ClientUpdate(NAME, 1, factors, dense)

    def merge(
        self, clients: Iterable[Mapping[str, Tensor]], start: Mapping[str, Tensor], server_round: int
    ) -> dict[str, Tensor]:
        """Return x by name, in the types of `start`, and move the clipping norm if it is adaptive.

        Parameters
        ----------
        clients : iterable of mapping of str to Tensor
            x_k of those who answered, of the names and shapes of `start`; further names do not count.
        start : mapping of str to Tensor
            x_0.
        server_round : int
            From 1.
        """
        names = sorted(start)  # an order that no client and no worker decides
        before = {name: start[name].to("cpu", torch.float64) for name in names}
        sums = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
        count = 0.0
        for tensors in clients:
            change = {name: tensors[name].to("cpu", torch.float64) - before[name] for name in names}
            norm = update_norm(change)
            count += 0.5 if norm <= self.clip else -0.5
            if math.isfinite(norm):  # else S / |u| is zero, which infinite entries would turn into NaN
                for name in names:
                    sums[name].add_(change[name], alpha=clip_factor(norm, self.clip))
            del tensors, change  # else they live on while the next one is read
        noise = self._randomness("client noise", server_round)
        deviation = self.privacy.update_noise(self.expected) * self.privacy.sensitivity * self.clip
        for name in names:
            if deviation > 0:
                sums[name].add_(noise.normal(sums[name].shape), alpha=deviation)
            sums[name].div_(self.expected).add_(before[name])
        if self.privacy.adaptive is not None:
            self._move_clip(self.privacy.adaptive, count, server_round)
        return {name: sums[name].to(start[name]) for name in names}

    def memory(self) -> dict[str, Tensor]:
        """Return the clipping norm; the noise has no state, as it follows from seed and round, or from nothing."""
        return {CLIP: torch.tensor([self.clip], dtype=torch.float64)}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Take up what `memory` returned."""
        self.clip = float(memory[CLIP])

    def _move_clip(self, adaptive: AdaptiveClipping, count: float, server_round: int) -> None:
        noise = float(self._randomness("client count noise", server_round).normal((1,)))
        deviation = self.privacy.sensitivity * self.privacy.count_noise(self.expected)
        share = (count + deviation * noise) / self.expected + 0.5
        # as logarithms, which no noise can make overflow
        moved = math.log(self.clip) - adaptive.learning_rate * (share - adaptive.quantile)
        middle, reach = math.log(self.privacy.clip), math.log(CLIP_RANGE)
        self.clip = math.exp(min(max(moved, middle - reach), middle + reach))

    def _randomness(self, purpose: str, server_round: int) -> Randomness:
        return secure() if self.privacy.rng == "secure" else seeded(self._seed, purpose, server_round)


def _tensors(updates: Iterable[ClientUpdate]) -> Iterator[dict[str, Tensor]]:
    for update in updates:
        tensors = AdapterState(update.factors, update.dense).adapter_tensors()
        del update  # else it lives on while the next one is read
        yield tensors
        del tensors
