"""A federated regression small enough to see what separates methods: each client's loss is known in closed form.

Client k wants W_k ``(d_out, d_in)`` of its own and sees inputs of covariance C_k: its loss is

    L_k(W) = tr((W - W_k) C_k (W - W_k)^T) / 2,

and the federation's is their mean, least at a W* that needs no adapter to be found. The base is zero, so that W is what
adapter and change of the base make together. Every W_k is the same matrix of some rank, and a part of the client's own.
Clients train as they are told to by a method's exchange, by gradient descent on all of L_k; the server is the method's
own `aggregate`. What is reported is excess loss: 0 at W*, 1 where nothing has been learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.base_change import matrix
from fedpeft.draws import draw_a
from fedpeft.state import A_SUFFIX, AdapterState, ClientUpdate, LoraFactors, Role
from fedpeft.strategies import find
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.factors import aggregation_error, sent_products

LAYER = "layer"
FFA = "ffa-lora"  # fedit with a frozen A


@dataclass(frozen=True)
class Regression:
    """What the clients want and how they train.

    Parameters
    ----------
    target_rank : int
        Rank of what all clients want.
    rank : int
        r of the adapters.
    steps, rounds : int
        Steps a round, and rounds.
    learning_rate : float
        Of gradient descent; 1 would be Newton's for a linear model and the clients' mean covariance.
    own : float
        How large a client's own part of W_k is beside the shared one.
    skew : float
        How unlike the clients' inputs are; 0 is alike.
    clients, d_out, d_in : int
        Sizes.
    """

    target_rank: int = 8
    rank: int = 2
    steps: int = 50
    rounds: int = 10
    learning_rate: float = 0.2
    own: float = 0.3
    skew: float = 1.0
    clients: int = 6
    d_out: int = 24
    d_in: int = 32

    def wanted(self, seed: int) -> tuple[Tensor, Tensor]:
        """Draw W_k ``(K, d_out, d_in)`` and C_k ``(K, d_in, d_in)``, whose mean trace is d_in."""
        draw = np.random.default_rng(seed)
        left = np.linalg.qr(draw.standard_normal((self.d_out, self.target_rank)))[0]
        right = np.linalg.qr(draw.standard_normal((self.d_in, self.target_rank)))[0]
        shared = left @ right.T * np.sqrt(self.d_out / self.target_rank)  # |shared|^2 = d_out, all directions alike
        own = draw.standard_normal((self.clients, self.d_out, self.d_in)) / np.sqrt(self.d_in)
        spread = np.exp(self.skew * draw.standard_normal((self.clients, self.d_in)))
        turns = [np.linalg.qr(draw.standard_normal((self.d_in, self.d_in)))[0] for _ in range(self.clients)]
        C = np.stack([turn * values @ turn.T for turn, values in zip(turns, spread, strict=True)])
        return torch.from_numpy(shared + self.own * own), torch.from_numpy(C / spread.mean())


@dataclass(frozen=True)
class Result:
    """What a method came to.

    Parameters
    ----------
    excess : float
        Excess loss after the last round.
    error : float
        Mean over rounds of |DW - sent| / |DW|, DW and what is sent counted from the base that the round began with.
    rank : int
        Of W, the directions that hold all but a millionth of its energy.
    """

    excess: float
    error: float
    rank: int


def run(name: str, problem: Regression, seed: int, options: Mapping[str, Any] | None = None) -> Result:
    """Let a method do all rounds.

    Parameters
    ----------
    name : str
        Of a strategy whose clients train A and B, or `FFA`.
    problem : Regression
        What is to be learned.
    seed : int
        Draws the problem and A.
    options : mapping, optional
        The method's.
    """
    targets, C = problem.wanted(seed)
    frozen = (LAYER + A_SUFFIX,) if name == FFA else ()
    method = find("fedit" if name == FFA else name)(seed=seed, scaling=1.0, frozen=frozen, **(options or {}))
    A = draw_a(seed, 0, LAYER, problem.rank, problem.d_in).double()
    state = AdapterState({LAYER: LoraFactors(A, torch.zeros(problem.d_out, problem.rank).double(), 1.0)})
    errors = []
    for server_round in range(1, problem.rounds + 1):
        method.server_round = server_round
        updates = _trained(method, state, problem, targets, C, seed, frozen)
        state = method.aggregate(iter(updates), state)
        errors.append(aggregation_error(updates, sent_products(state)))
    W = _whole(state)
    mean = C.mean(dim=0)
    best = torch.linalg.solve(mean, torch.einsum("koi,kij->oj", targets, C).T / problem.clients).T
    loss, least, at_first = (_loss(candidate, targets, C) for candidate in (W, best, torch.zeros_like(W)))
    S = torch.linalg.svdvals(W).square()
    return Result((loss - least) / (at_first - least), float(np.mean(errors)), int((S > 1e-6 * S.sum()).sum()))


def _trained(
    method: AdapterStrategy,
    state: AdapterState,
    problem: Regression,
    targets: Tensor,
    C: Tensor,
    seed: int,
    frozen: tuple[str, ...],
) -> list[ClientUpdate]:
    """Let all clients do a round's steps, side by side: what is shared is one tensor at first, then one each."""
    exchange, f = method.exchange(method.server_round), state.factors[LAYER]
    A, B = f.A, f.B
    if Role.A in exchange.drawn:
        A, B = draw_a(seed, exchange.draw, LAYER, *A.shape).double(), torch.zeros_like(B)
    base = _changed(state)
    A, B = (factor.expand(problem.clients, *factor.shape) for factor in (A, B))  # (K, r, d_in), (K, d_out, r)
    trains_a = Role.A in exchange.trained and not frozen
    for _ in range(problem.steps):
        G = (f.scaling * B @ A + base - targets) @ C  # (K, d_out, d_in)
        step_a, step_b = B.transpose(1, 2) @ G, G @ A.transpose(1, 2)
        if trains_a:
            A = A - problem.learning_rate * f.scaling * step_a
        if Role.B in exchange.trained:
            B = B - problem.learning_rate * f.scaling * step_b
    return [ClientUpdate(str(k), 1, {LAYER: LoraFactors(A[k], B[k], f.scaling)}) for k in range(problem.clients)]


def _changed(state: AdapterState) -> Tensor | float:
    change = state.base.get(LAYER)
    pieces = [] if change is None else [piece for piece in (change.earlier, change.last) if piece is not None]
    return sum((matrix(piece).double() for piece in pieces), torch.zeros(()))


def _whole(state: AdapterState) -> Tensor:
    return state.factors[LAYER].product().double() + _changed(state)


def _loss(W: Tensor, targets: Tensor, C: Tensor) -> float:
    missed = W - targets
    return float(torch.einsum("koi,kij,koj->k", missed, C, missed).mean() / 2)
