"""LoRA-LEGO: single ranks of all clients, clustered; each cluster becomes one rank of the merged adapter.

Z. Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise
Clustering", arXiv 2409.16167. A minimal semantic unit is one rank, m_i = [a_i; b_i] with a_i = A_k[i, :] and
b_i = s_k B_k[:, i]. All units of a layer are pooled, k-means makes k clusters of them, and each centroid (a_j, b_j) is
one rank of the result. How long the ranks are is `reweight`:

``paper``          centroid scaled to the mean norm of its units, the output by sqrt(r) / sqrt(k), r the clients' mean
                   rank. Made for merging tasks; as a mean it overshoots: at k = K r equal weights give sqrt(K) DW.
``least-squares``  (default) the c that minimise |DW - sum_j c_j b_j a_j^T| over the clusters' directions, by a k x k
                   solve. Exact at k = R = sum_k r_k.
``none``           the bare centroids.

What differs from the paper, since (c b, a / c) is the same rank for every c, while distances between units are not:

* |a| = |b| is fixed for each unit before clustering. In a federation all clients share A0 and |a| >> |b| early, so that
  raw units would just group by index. Units with b = 0 say nothing and are dropped.
* (-a, -b) is the same unit, so each one takes the sign that is nearer to its centroid.
* Units weigh p_k = n_k / sum n in centroids and in mean norms.
* The start is greedy, nothing in it is drawn (see `.algebra.clustering`), and units are put in an order given
  by their content first: neither the order of clients nor of any client's ranks matters.
* A merged rank gets |a| back as its cluster's clients had it on average, and b takes the rest: clients that train it on
  find the A and B they know, not a balanced pair whose gradients have other sizes.
* Ranks without a cluster get b = 0 and a random a, so that they can be trained.

With a frozen, shared A, ranks of equal index share a, so that clusters are the indices, and A is sent back unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors, Role
from fedpeft.config import AdapterConfig
from fedpeft.errors import ConfigError
from fedpeft.seeds import generator
from fedpeft.strategies.algebra.clustering import axial_kmeans
from fedpeft.strategies.algebra.factors import client_weights, require_layers
from fedpeft.strategies.algebra.means import mean_dense, weighted_mean
from fedpeft.strategies.algebra.units import Units, columns_of, inner_products, norms, pool, write_gram
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import FROZEN_A_KINDS, Capabilities, Merging
from fedpeft.strategies.rounds.ranks import cut

SCALING = ".scaling"  # ends names in a checkpoint
Reweight = Literal["least-squares", "paper", "none"]

# Layers of equal shape are clustered together, up to this many bytes: small layers then cost fewer calls.
BATCH_BYTES = 2**28
# Combinations of ranks that the k x k system sees with less than this share of its largest eigenvalue keep the lengths
# they have: solving for them would make huge ranks that cancel each other. A square: 3e-3 of the clients' own size.
RESOLUTION = 1e-5


def merge(
    units: Units, labels: Tensor, signs: Tensor, padding: Tensor, reweight: Reweight, output_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Turn clusters into ranks.

    Parameters
    ----------
    units : Units
        The pooled units of a layer.
    labels, signs : Tensor
        Cluster of each unit, and +1 or -1 as it enters it, ``(U,)``.
    padding : Tensor
        Rows of A for ranks without a cluster, ``(k, d_in)``.
    reweight : {"least-squares", "paper", "none"}
        See the module's description.
    output_scale : float
        sqrt(r) / sqrt(k), for "paper".

    Returns
    -------
    tuple of Tensor
        A ``(k, d_in)`` and B ``(d_out, k)``, float64, whose product is the merged update.
    """
    k = padding.shape[0]
    share = torch.zeros(k, len(labels), dtype=torch.float64)  # (k, U)
    share[labels, torch.arange(len(labels))] = units.weights
    mass = share.sum(dim=1)  # (k,)
    share = share / torch.where(mass > 0, mass, 1.0)[:, None]
    share_signed = share * signs
    centroids = torch.cat([share_signed @ x.to(torch.float64) for x in columns_of(units.m)], dim=1)  # (k, d_in + d_out)
    a, b = centroids[:, : units.d_in], centroids[:, units.d_in :]
    a_size, b_size = a.norm(dim=1), b.norm(dim=1)
    live = a_size * b_size > 0
    a = a / torch.where(live, a_size, 1.0)[:, None]
    b = b / torch.where(live, b_size, 1.0)[:, None]
    size = a_size * b_size  # |b_j a_j^T|
    if reweight == "paper":
        mean_norms = share @ norms(units.m)
        growth = mean_norms / torch.where(live, centroids.norm(dim=1), 1.0)
        size = size * growth.square() * output_scale
    elif reweight == "least-squares":
        # Beginning at mass * size, which is right where all units of a cluster are equal, and solving for the change
        # only keeps that right whatever a singular system cannot tell apart.
        gram = (a @ a.T) * (b @ b.T)  # (k, k) <b_i a_i^T, b_j a_j^T>
        seen = (inner_products(a, units.a) * inner_products(b, units.b)) @ units.weights  # (k,) <b_j a_j^T, DW>
        size = mass * size
        size = size + torch.linalg.pinv(gram, rtol=RESOLUTION, hermitian=True) @ (seen - gram @ size)
    a_norms = share @ units.a_norms
    A = torch.where(live[:, None], a * a_norms[:, None], padding)
    B = torch.where(live, size / torch.where(live, a_norms, 1.0), 0.0) * b.T
    return A, B


def merge_layers(
    updates: Sequence[ClientUpdate],
    current: AdapterState,
    rank: int | None = None,
    reweight: Reweight = "least-squares",
    seed: int = 0,
) -> dict[str, LoraFactors]:
    """Merge all layers of a cohort.

    Parameters
    ----------
    updates : sequence of ClientUpdate
        The cohort; ranks and scalings may differ.
    current : AdapterState
        The adapter that the clients started from; the result has its scalings and types.
    rank : int, optional
        k, ranks of the result; those of `current` if not given.
    reweight : {"least-squares", "paper", "none"}
        See the module's description.
    seed : int
        The run's seed, from which A of ranks without a cluster is drawn.

    Returns
    -------
    dict of str to LoraFactors
        A ``(k, d_in)`` and B ``(d_out, k)`` of each layer.
    """
    for update in updates:
        require_layers(update, current)
    weights = client_weights(updates)
    merged: dict[str, LoraFactors] = {}
    for k, layers in _batches(updates, current, rank):
        pools = {layer: pool([u.factors[layer] for u in updates], weights) for layer in layers}
        clusters = _cluster(pools, k)
        for layer, units in pools.items():
            labels, signs = clusters[layer]
            f = current.factors[layer]
            mean_rank = sum(p * u.factors[layer].rank for p, u in zip(weights, updates, strict=True))
            A, B = merge(units, labels, signs, _padding(f, k, layer, seed), reweight, (mean_rank / k) ** 0.5)
            merged[layer] = replace(f, A=A.to(f.A).contiguous(), B=(B / f.scaling).to(f.B).contiguous())
    return {layer: merged[layer] for layer in current.factors}


def _batches(
    updates: Sequence[ClientUpdate], current: AdapterState, rank: int | None
) -> Iterable[tuple[int, list[str]]]:
    """Group layers that can be clustered at once: equal shapes and k, and no more than fit in memory."""
    groups: defaultdict[tuple[int, int, int], list[str]] = defaultdict(list)
    for layer, f in current.factors.items():
        groups[rank or f.rank, f.A.shape[1], f.B.shape[0]].append(layer)
    for (k, d_in, d_out), layers in groups.items():
        most = max(sum(u.factors[layer].rank for u in updates) for layer in layers)
        at_once = max(1, BATCH_BYTES // (8 * most * (d_in + d_out + most)))
        for start in range(0, len(layers), at_once):
            yield k, layers[start : start + at_once]


def _cluster(pools: Mapping[str, Units], k: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each layer's cluster labels and signs; where k units or fewer are live, each is its own cluster."""
    clusters = {layer: (torch.arange(len(u.m)), torch.ones(len(u.m))) for layer, u in pools.items()}
    crowded = [layer for layer, units in pools.items() if len(units.m) > k]
    if not crowded:
        return clusters
    most = max(len(pools[layer].m) for layer in crowded)
    dtype = torch.float64 if any(pools[layer].m.dtype == torch.float64 for layer in crowded) else torch.float32
    gram = torch.zeros(len(crowded), most, most, dtype=dtype)
    weights = torch.zeros(len(crowded), most, dtype=torch.float64)
    for i, layer in enumerate(crowded):
        units = pools[layer]
        live = len(units.m)
        write_gram(units.m, gram[i, :live, :live])
        weights[i, :live] = units.weights
    labels, signs = axial_kmeans(gram, weights, k)
    for i, layer in enumerate(crowded):
        live = len(pools[layer].m)
        clusters[layer] = labels[i, :live], signs[i, :live]
    return clusters


def _padding(current: LoraFactors, k: int, layer: str, seed: int) -> Tensor:
    """Draw k rows of A with the mean norm of the adapter's own."""
    rows = torch.from_numpy(generator(seed, "lora-lego", "padding", layer).standard_normal((k, current.A.shape[1])))
    size = float(current.A.to(torch.float64).norm(dim=1).mean()) or 1.0
    return rows.mul_(size / rows.norm(dim=1, keepdim=True))


def merge_frozen(updates: Sequence[ClientUpdate], current: AdapterState, reweight: Reweight) -> AdapterState:
    """Merge clients that share a frozen A: units of equal index cluster, and the b part alone changes.

    Then least squares and the bare centroid are both the weighted mean of B, which is exact. "paper" scales each mean
    column to its units' mean norm; k = r leaves the output's scale at 1.
    """
    mean = weighted_mean(updates, current, trains_a=False)
    if reweight != "paper":
        return mean
    weights = client_weights(updates)
    merged = {}
    for layer, f in mean.factors.items():
        wanted = torch.zeros(f.rank, dtype=torch.float64)  # mean norms
        for update, p in zip(updates, weights, strict=True):
            g = update.factors[layer]
            wanted += p * g.scaling / f.scaling * g.B.to(torch.float64).norm(dim=0)
        B = f.B.to(torch.float64)
        size = B.norm(dim=0)
        merged[layer] = replace(f, B=(B * torch.where(size > 0, wanted / size, 0.0)).to(f.B))
    return AdapterState(merged, mean.dense)


def refuse_other_rank(rank: int | None, frozen_rank: int) -> None:
    """Raise ConfigError if `strategy.rank` differs from the rank of a frozen A, which is sent back as it is."""
    if rank not in (None, frozen_rank):
        raise ConfigError(
            f"strategy.rank = {rank}, but a frozen A (adapter.kind = '{FROZEN_A_KINDS}') keeps its rank {frozen_rank}; "
            "leave strategy.rank unset"
        )


class LoraLegoOptions(StrategyOptions):
    """Options of LoRA-LEGO."""

    rank: int | None = Field(None, ge=1, description="k, ranks of the merged adapter; adapter.rank if unset")
    reweight: Reweight = Field(
        "least-squares", description="length of merged ranks: nearest to the mean of products, the paper's, or none"
    )


class LoraLego(AdapterStrategy):
    """Rank-wise clustering of all clients' ranks (arXiv 2409.16167)."""

    name = "lora-lego"
    capabilities = Capabilities(
        paper="arXiv 2409.16167",
        sends="centroids of k clusters of ranks",
        exact=f"with least-squares at k = sum of the clients' ranks, and where A is frozen ({FROZEN_A_KINDS})",
        needs_single_factors=True,
        changes_rank=True,
        mixed_ranks=True,
        merging=Merging(any_rank=True, rank_option="rank"),
    )
    Options = LoraLegoOptions
    options: LoraLegoOptions

    @classmethod
    def check(cls, options: LoraLegoOptions, adapter: AdapterConfig) -> None:
        """Raise ConfigError if a frozen A is to change its rank, or clients are to have two ranks each."""
        if options.rank is not None and adapter.ranks is not None:
            raise ConfigError(
                f"strategy.rank = {options.rank} and adapter.ranks = {','.join(map(str, adapter.ranks))} exclude each "
                "other: clients of rank r are sent r clusters; leave strategy.rank unset"
            )
        if Role.A in adapter.facts.fixed:
            refuse_other_rank(options.rank, adapter.rank)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._smaller: dict[int, dict[str, LoraFactors]] = {}  # merged for clients of ranks below the adapter's

    def view(self, state: AdapterState, rank: int, scaling: float) -> AdapterState:
        """Send a client of rank r the last round's r clusters."""
        factors = self._smaller.get(rank, state.factors)
        return cut(replace(state, factors=factors), rank, scaling)

    def memory(self) -> dict[str, Tensor]:
        """Return what clients of smaller ranks are sent."""
        return {
            f"rank-{rank}.{name}": tensor
            for rank, factors in self._smaller.items()
            for name, tensor in AdapterState(factors).to_tensors().items()
        } | {
            f"rank-{rank}.{layer}{SCALING}": torch.tensor(f.scaling, dtype=torch.float64)
            for rank, factors in self._smaller.items()
            for layer, f in factors.items()
        }

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Take up what clients of smaller ranks are sent."""
        by_rank: dict[int, dict[str, Tensor]] = {}
        for name, tensor in memory.items():
            stem, _, own = name.partition(".")
            by_rank.setdefault(int(stem.removeprefix("rank-")), {})[own] = tensor
        self._smaller = {
            rank: {
                layer: replace(f, scaling=float(tensors[layer + SCALING]))
                for layer, f in AdapterState.from_tensors(
                    {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALING)}, 1.0
                ).factors.items()
            }
            for rank, tensors in by_rank.items()
        }

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Pool, cluster and reweight the cohort's ranks; see `merge_layers` and `merge_frozen`.

        Raises
        ------
        ConfigError
            See `refuse_other_rank`.
        """
        cohort = list(updates)
        rank, reweight = self.options.rank, self.options.reweight
        if self.trains_a:
            largest = max((f.rank for f in current.factors.values()), default=0)
            smaller = {each for each in self.terms.ranks if each < largest}
            self._smaller = {each: merge_layers(cohort, current, each, reweight, self.seed) for each in sorted(smaller)}
            return AdapterState(merge_layers(cohort, current, rank, reweight, self.seed), mean_dense(cohort, current))
        for f in current.factors.values():
            refuse_other_rank(rank, f.rank)
        return merge_frozen(cohort, current, reweight)
