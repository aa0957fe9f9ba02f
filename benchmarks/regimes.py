"""Two regimes in which methods do separate: the tables of docs/regimes.md.

A regression whose clients share a matrix of a higher rank than their adapters have; and digits with few, long rounds,
large steps and a frozen head. Run it with ``python -m benchmarks.regimes``; it takes some minutes on two cores, and
goes on where it was stopped. The tables are written into the document between their marks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.methods import between
from fedpeft.adapters.base_change import matrix
from fedpeft.adapters.draws import draw_a
from fedpeft.adapters.state import A_SUFFIX, AdapterState, ClientUpdate, LoraFactors, Role
from fedpeft.chatter import silence
from fedpeft.config import configure
from fedpeft.simulations.compare import split_words, write_comparison
from fedpeft.simulations.jobs import plan_jobs
from fedpeft.simulations.running import run_jobs
from fedpeft.strategies import find
from fedpeft.strategies.rounds.exchange import Exchange

TABLES = ("regression", "digits")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "regimes.md"

# --- digits ------------------------------------------------------------------------------------------------------

DIGITS: dict[str, object] = {
    "federation.rounds": 3,
    "train.local_steps": 20,
    "train.learning_rate": 1.5e-2,
    "train.batch_size": 8,
    "adapter.head": "frozen",
    "run.evaluate_every": 100,
    "simulation.workers": 0,
}
DIGITS_METHODS = ["fedit", "lora-fair", "fedit:adapter.kind=ffa-lora", "fedex-lora", "flora"]


def digits_table(out: Path, seeds: int) -> str:
    """Run the comparison on digits, and return its table."""
    rows, _ = split_words(DIGITS_METHODS)
    config = configure(DIGITS, preset="digits")
    jobs = plan_jobs(rows, config, seeds, out)
    write_comparison(jobs, run_jobs(jobs, config), out)
    return (out / "comparison.md").read_text(encoding="utf-8")


# --- regression --------------------------------------------------------------------------------------------------

LAYER = "layer"
FFA = "ffa-lora"  # fedit with a frozen A


@dataclass(frozen=True)
class Regression:
    """A federated regression small enough to see what separates methods: each client's loss has a closed form.

    Client k wants W_k ``(d_out, d_in)`` of its own and sees inputs of covariance C_k: its loss is

        L_k(W) = tr((W - W_k) C_k (W - W_k)^T) / 2,

    and the federation's is their mean, least at a W* that needs no adapter to be found. The base is zero, so that W is
    what adapter and change of the base make together. All W_k share one matrix of some rank, and have a part of their
    own. Clients train what a method's exchange says, by gradient descent on all of L_k; the server is the method's own
    `aggregate`. Excess loss is 0 at W*, and 1 where nothing has been learned.

    Parameters
    ----------
    target_rank : int
        Rank of what all clients want.
    rank : int
        r of the adapters.
    steps, rounds : int
        Steps a round, and rounds.
    learning_rate : float
        Of gradient descent.
    own : float
        How large a client's own part of W_k is beside the shared one.
    skew : float
        How unlike the clients' inputs are; 0 is alike.
    clients, d_out, d_in : int
        Sizes.
    """

    target_rank: int = 8
    rank: int = 2
    steps: int = 25
    rounds: int = 10
    learning_rate: float = 0.1
    own: float = 0.3
    skew: float = 0.5
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
        Mean over rounds of |DW - sent| / |DW|, both of the whole adapter on the base that the round began with.
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
        updates = _trained(method.exchange(server_round), state, problem, targets, C, seed, frozen)
        state = method.aggregate(iter(updates), state, server_round)
        errors.append(_error(updates, state))
    W = _whole(state)
    S = torch.linalg.svdvals(W).square()
    return Result(excess(W, targets, C), float(np.mean(errors)), int((1e-6 * S.sum() < S).sum()))


def excess(W: Tensor, targets: Tensor, C: Tensor) -> float:
    """Return the excess loss of W."""
    least, at_first = _loss(_optimum(targets, C), targets, C), _loss(torch.zeros_like(W), targets, C)
    return (_loss(W, targets, C) - least) / (at_first - least)


def floor(problem: Regression, seed: int) -> float:
    """Return the excess loss of the best matrix of the adapters' rank, which no method that keeps to it can go below.

    With C the mean of C_k, the excess of W is that of |(W - W*) C^1/2|^2: the best one cuts W* C^1/2 to r ranks.
    """
    targets, C = problem.wanted(seed)
    values, vectors = torch.linalg.eigh(C.mean(dim=0))
    root = vectors * values.sqrt()  # (d_in, d_in)
    U, S, Vt = torch.linalg.svd(_optimum(targets, C) @ root, full_matrices=False)
    r = problem.rank
    return excess(U[:, :r] * S[:r] @ torch.linalg.solve(root.T, Vt[:r].T).T, targets, C)


def _optimum(targets: Tensor, C: Tensor) -> Tensor:
    """Return W* ``(d_out, d_in)``, where the mean of the losses is least."""
    return torch.linalg.solve(C.mean(dim=0), (targets @ C).mean(dim=0).T).T


def _trained(
    exchange: Exchange,
    state: AdapterState,
    problem: Regression,
    targets: Tensor,
    C: Tensor,
    seed: int,
    frozen: tuple[str, ...],
) -> list[ClientUpdate]:
    """Let all clients do a round's steps, side by side: what is shared is one tensor at first, then one each."""
    f = state.factors[LAYER]
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


def _error(updates: Sequence[ClientUpdate], state: AdapterState) -> float:
    change = state.base.get(LAYER)
    last = 0.0 if change is None or change.last is None else matrix(change.last).double()
    ideal = torch.stack([update.factors[LAYER].product() for update in updates]).mean(dim=0)
    return float((ideal - state.factors[LAYER].product() - last).norm() / ideal.norm())


def _changed(state: AdapterState) -> Tensor | float:
    change = state.base.get(LAYER)
    pieces = [] if change is None else [piece for piece in (change.earlier, change.last) if piece is not None]
    return sum((matrix(piece).double() for piece in pieces), torch.zeros(()))


def _whole(state: AdapterState) -> Tensor:
    return state.factors[LAYER].product().double() + _changed(state)


def _loss(W: Tensor, targets: Tensor, C: Tensor) -> float:
    missed = W - targets
    return float(torch.einsum("koi,kij,koj->k", missed, C, missed).mean() / 2)


BELOW, AT, SHORT = "rank 2 of 8", "rank 8 of 8", "rank 2 of 8, short rounds"
METHODS = [*("fedit", "lora-fair", "lora-lego", "flexlora", "hetlora", "fedrot-lora", "florist"), FFA]
METHODS += ["fedsvd", "rolora", "fedex-lora", "flora"]


def regression_table(seeds: int, problem: Regression | None = None) -> str:
    """Let all methods do three regressions with some seeds, and return a table of what they came to."""
    below = problem or Regression()
    problems = {
        BELOW: below,
        AT: replace(below, rank=below.target_rank),
        SHORT: replace(below, steps=max(1, below.steps // 5), rounds=5 * below.rounds),
    }
    columns = ["method"]
    columns += [f"{what}, {name}" for name in problems for what in ("excess loss", "error", "rank")]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for method in METHODS:
        cells = [method]
        for each in problems.values():
            results = [run(method, each, seed) for seed in range(seeds)]
            ranks = sorted({result.rank for result in results})
            error = statistics.fmean(result.error for result in results)
            cells += [_with_spread([result.excess for result in results]), "0" if error < 1e-9 else f"{error:.3f}"]
            cells += [f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])]
        lines.append(cells)
    least = ["*the best W of that rank*"]
    for each in problems.values():
        least += [_with_spread([floor(each, seed) for seed in range(seeds)]), "", str(each.rank)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, least])


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    """Run both, and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/regimes"))
    parser.add_argument("--only", choices=TABLES, help="one of the tables")
    arguments = parser.parse_args()
    silence()
    seeds = arguments.seeds
    for name in [arguments.only] if arguments.only else TABLES:
        table = regression_table(seeds) if name == "regression" else digits_table(arguments.out, seeds)
        DOCUMENT.write_text(between(DOCUMENT.read_text(encoding="utf-8"), name, table), encoding="utf-8")


if __name__ == "__main__":
    main()
