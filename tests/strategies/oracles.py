"""Cohorts to merge, and slow dense float64 answers that anyone can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors
from fedpeft.strategies.base import AdapterStrategy

LAYERS = ("encoder.0.query", "encoder.1.query")


@dataclass(frozen=True)
class Cohort:
    """Updates of some clients, and the adapter that they started from."""

    updates: list[ClientUpdate]
    current: AdapterState


def make_cohort(
    seed: int = 0,
    rows: Sequence[int] = (5, 1, 14),
    ranks: Sequence[int] = (3, 3, 3),
    scalings: Sequence[float] = (2.0, 2.0, 2.0),
    d_in: int = 7,
    d_out: int = 11,
    output_scaling: float = 2.0,
    rank: int | None = None,
) -> Cohort:
    """Draw a cohort of independent clients with two layers, not square, and a head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    updates = [
        ClientUpdate(
            str(k),
            n,
            {layer: LoraFactors(normal(r, d_in), normal(d_out, r), s) for layer in LAYERS},
            {"classifier.weight": normal(4, d_out)},
        )
        for k, (n, r, s) in enumerate(zip(rows, ranks, scalings, strict=True))
    ]
    rank = rank or ranks[0]
    current = AdapterState(
        {
            layer: LoraFactors(normal(rank, d_in), torch.zeros_like(normal(d_out, rank)), output_scaling)
            for layer in LAYERS
        },
        {"classifier.weight": normal(4, d_out)},
    )
    return Cohort(updates, current)


@st.composite
def cohorts(draw: st.DrawFn, mixed: bool = True, max_clients: int = 5, max_rank: int = 4) -> Cohort:
    """Cohorts over shapes, ranks, row counts and scalings; of equal ranks unless `mixed`."""
    clients = draw(st.integers(1, max_clients))
    rank = draw(st.integers(1, max_rank))
    ranks = draw(st.lists(st.integers(1, max_rank), min_size=clients, max_size=clients)) if mixed else [rank] * clients
    d_in = draw(st.integers(2, 12))
    return make_cohort(
        draw(st.integers(0, 2**20)),
        draw(st.lists(st.integers(1, 60), min_size=clients, max_size=clients)),
        ranks,
        draw(st.lists(st.sampled_from([0.25, 1.0, 2.0, 3.0]), min_size=clients, max_size=clients)),
        d_in,
        draw(st.integers(2, 12).filter(lambda d_out: d_out != d_in)),
        draw(st.sampled_from([0.5, 1.0, 2.0])),
        None if not mixed else rank,
    )


def make(method: type[AdapterStrategy], frozen_a: bool = False, **options: Any) -> AdapterStrategy:
    """Build a strategy that aggregates; `frozen_a` as for clients that train B only."""
    return method(seed=3, frozen=[layer + ".lora_A.weight" for layer in LAYERS] if frozen_a else [], **options)


def share_a(cohort: Cohort) -> Cohort:
    """Give all clients the A of the adapter that they started from, as FFA-LoRA does."""
    updates = [
        replace(u, factors={layer: replace(f, A=cohort.current.factors[layer].A) for layer, f in u.factors.items()})
        for u in cohort.updates
    ]
    return Cohort(updates, cohort.current)


def per_layer(update: ClientUpdate, change: Callable[[LoraFactors], LoraFactors]) -> ClientUpdate:
    """Return the update with every layer's factors changed."""
    return replace(update, factors={layer: change(f) for layer, f in update.factors.items()})


def permute_ranks(f: LoraFactors, order: Sequence[int]) -> LoraFactors:
    """Return the same adapter with its ranks in another order."""
    return replace(f, A=f.A[list(order)], B=f.B[:, list(order)])


def permuted(update: ClientUpdate, order: Sequence[int]) -> ClientUpdate:
    """Return the same update with the ranks of every layer in another order."""
    return per_layer(update, lambda f: permute_ranks(f, order))


def mean(values: Sequence[Tensor], updates: Sequence[ClientUpdate]) -> Tensor:
    """Average, each client weighted with its rows."""
    total = sum(u.num_examples for u in updates)
    return torch.stack([v * (u.num_examples / total) for v, u in zip(values, updates, strict=True)]).sum(dim=0)


def ideal(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Return DW of each layer, dense."""
    return {layer: mean([u.factors[layer].product() for u in updates], updates) for layer in updates[0].factors}


def products(state: AdapterState) -> dict[str, Tensor]:
    """Return s B A of each layer, dense."""
    return {layer: f.product() for layer, f in state.factors.items()}


def dense_error(updates: Sequence[ClientUpdate], state: AdapterState) -> float:
    """Return |DW - sent| / |DW| over all layers as one vector."""
    target, sent = ideal(updates), products(state)
    residual = torch.cat([(target[layer] - sent[layer]).flatten() for layer in sent])
    return float(residual.norm() / torch.cat([target[layer].flatten() for layer in sent]).norm())


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Compare tensors by name, relative to the largest entry of each."""
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=tolerance * scale)
