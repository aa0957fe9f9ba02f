"""The two errors of a round against dense float64 products, for every method and over several rounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedpeft.adapters.base_change import dense
from fedpeft.adapters.state import AdapterState, ClientUpdate, LoraFactors, Role
from fedpeft.strategies import STRATEGIES
from fedpeft.strategies.algebra.factors import RoundErrors, round_errors, squared_norms
from fedpeft.strategies.base import AdapterStrategy
from tests.strategies.oracles import LAYERS, ideal, make, make_cohort

MERGING = sorted(
    name for name, method in STRATEGIES.items() if not method.capabilities.personal & {Role.A, Role.B, Role.R}
)
D_IN, D_OUT = 7, 11
ROWS = (5, 1, 14)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(name: str, rank: int) -> AdapterState:
    """Return an adapter as a run begins with it: B is zero, or a part of the base was moved into it."""
    facts = STRATEGIES[name].capabilities
    moved = facts.init == "pissa"
    factors = {}
    for seed, layer in enumerate(LAYERS):
        square = facts.updates == {"square"}
        B = normal(50 + seed, D_OUT, rank) if moved or square else torch.zeros(D_OUT, rank).double()
        R = torch.zeros(rank, rank).double() if square else None
        factors[layer] = LoraFactors(normal(seed, rank, D_IN), B, 2.0, R)
    return AdapterState(factors, {"classifier.weight": normal(9, 4, D_OUT)})


def trained(
    method: AdapterStrategy, state: AdapterState, ranks: tuple[int, ...], length: float, server_round: int
) -> list[ClientUpdate]:
    """Let clients leave what they were sent, each in its own direction, in what the round trains alone."""
    updates = []
    roles = method.exchange(server_round).trained
    for k, (rows, rank) in enumerate(zip(ROWS, ranks, strict=True)):
        view, seed = method.view(state, rank, 6.0 / rank), 1000 * server_round + 100 * k
        factors = {}
        for layer, f in view.factors.items():
            seed += 10
            A = f.A + length * normal(seed, *f.A.shape) if Role.A in roles and f.R is None else f.A
            B = f.B + length * normal(seed + 1, *f.B.shape) if Role.B in roles and f.R is None else f.B
            R = None if f.R is None else f.R + length * normal(seed + 2, *f.R.shape)
            factors[layer] = replace(f, A=A, B=B, R=R)
        updates.append(ClientUpdate(str(k), rows, factors, {"classifier.weight": normal(k, 4, D_OUT)}))
    return updates


def vector(products: dict[str, Tensor]) -> Tensor:
    return torch.cat([products[layer].flatten() for layer in LAYERS])


def base(state: AdapterState) -> dict[str, Tensor]:
    nothing = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    return {layer: dense(state.base[layer]) if layer in state.base else nothing for layer in LAYERS}


@pytest.mark.parametrize(
    ("name", "mixed"),
    [
        pytest.param(name, mixed, id=f"{name}, {'mixed' if mixed else 'equal'} ranks")
        for name in MERGING
        for mixed in (False, True)
        if STRATEGIES[name].capabilities.mixed_ranks or not mixed
    ],
)
def test_both_errors_equal_the_dense_ones_in_every_round(name: str, mixed: bool) -> None:
    ranks = (3, 1, 2) if mixed else (3, 3, 3)
    method = make(STRATEGIES[name], **({"ranks": ranks, "scaling": 2.0} if mixed else {}))
    state = started(name, 3)
    offset = dict(state.factors) if STRATEGIES[name].capabilities.init == "pissa" else {}
    drawn = vector({layer: f.product() for layer, f in offset.items()}) if offset else 0.0
    for server_round in (1, 2, 3):
        updates = trained(method, state, ranks, 0.3, server_round)
        merged = method.aggregate(iter(updates), state, server_round)
        target = vector(ideal(updates))
        begun = vector({layer: f.product() for layer, f in state.factors.items()})
        # the whole of what the next round begins with, less the whole of what this one began with
        step = vector({layer: f.product() for layer, f in merged.factors.items()}) + vector(base(merged))
        residual = target - begun - (step - begun - vector(base(state)))
        total = target + vector(base(state)) - drawn
        errors = round_errors(updates, state, merged, offset)
        assert errors.of_step == pytest.approx(float(residual.norm() / (target - begun).norm()), abs=1e-12)
        assert errors.of_total == pytest.approx(float(residual.norm() / total.norm()), abs=1e-12)
        if server_round == 3 and STRATEGIES[name].capabilities.exact.startswith("always"):
            assert errors.of_step < 1e-12
        state = merged


@pytest.mark.parametrize("name", MERGING)
def test_a_round_in_which_nobody_moves_has_no_error(name: str) -> None:
    method = make(STRATEGIES[name], **({"rotate_lambda": 0.5} if name == "fedrot-lora" else {}))
    state = started(name, 3)
    if name not in ("flora", "frlora", "fed-sb"):  # whose rounds begin where they are
        f32 = {n: replace(f, A=f.A.float(), B=normal(3, *f.B.shape).float()) for n, f in state.factors.items()}
        state = AdapterState(f32, {n: t.float() for n, t in state.dense.items()})
    updates = trained(method, state, (3, 3, 3), 0.0, 2)
    updates = [replace(u, factors=state.factors) for u in updates]
    merged = method.aggregate(iter(updates), state, 2)
    if name == "florist":  # drops directions, whoever moves
        assert round_errors(updates, state, merged).of_step in (0.0, math.inf)
        return
    errors = round_errors(updates, state, merged, state.factors if name == "frlora" else None)
    assert errors.of_step == 0.0
    assert errors.of_total < 1e-6


def test_an_adapter_that_moves_where_nobody_did_is_infinitely_wrong_and_never_nan() -> None:
    cohort = make_cohort()
    still = [replace(u, factors=cohort.updates[0].factors) for u in cohort.updates]
    begun = AdapterState(cohort.updates[0].factors)
    moved = AdapterState(cohort.updates[1].factors)
    assert round_errors(still, begun, moved).of_step == math.inf
    assert round_errors(still, begun, begun).of_step == 0.0
    blank = AdapterState({n: replace(f, B=torch.zeros_like(f.B)) for n, f in begun.factors.items()})
    idle = [replace(u, factors=blank.factors) for u in still]
    assert round_errors(idle, blank, blank) == RoundErrors(0.0, 0.0)


@pytest.mark.parametrize("dense_terms", [False, True])
@pytest.mark.parametrize("d_out", [1100, 13], ids=["many rows", "few rows"])
def test_norms_of_sums_equal_the_dense_ones(d_out: int, dense_terms: bool) -> None:
    terms: list[LoraFactors | Tensor] = [
        LoraFactors(normal(1, 3, 90), normal(2, d_out, 3), 2.0),
        LoraFactors(normal(3, 2, 90), normal(4, d_out, 2), 0.5, normal(5, 2, 2)),
    ]
    whole = [t.product() for t in terms if isinstance(t, LoraFactors)]
    if dense_terms:
        terms, whole = [*terms, normal(6, d_out, 90)], [*whole, normal(6, d_out, 90)]
    last = len(terms) - 1
    found = squared_norms(terms, [{0: 1, last: -1}, {1: 2}, {last: 1, 0: 1}, {}])
    expected = [whole[0] - whole[last], 2 * whole[1], whole[last] + whole[0], 0 * whole[0]]
    assert found == pytest.approx([float(each.square().sum()) for each in expected], rel=1e-12)


def test_the_step_is_small_beside_the_total_late_in_a_run() -> None:
    """The same distance is one per cent of what is learned, and a third of what the round was to change."""
    method, state = make(STRATEGIES["fedit"]), started("fedit", 3)
    grown = {n: replace(f, B=10 * normal(7, *f.B.shape)) for n, f in state.factors.items()}
    state = replace(state, factors=grown)
    updates = trained(method, state, (3, 3, 3), 0.2, 9)
    errors = round_errors(updates, state, method.aggregate(iter(updates), state, 9))
    assert errors.of_step > 5 * errors.of_total > 0


def test_methods_without_a_global_product_are_left_out() -> None:
    assert set(STRATEGIES) - set(MERGING) == {"fedsa-lora", "local"}
