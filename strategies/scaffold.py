"""SCAFFOLD: every client's steps are corrected by where all clients pull, less where it pulls itself.

S. P. Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv
1910.06378, Algorithm 1 with option II. The server holds x and c, each client i a control variate c_i, all of them
zero at first. In a round, client i starts at y = x and makes K steps

    y <- y - lr (g_i(y) + c - c_i),

keeps c_i+ = c_i - c + (x - y) / (K lr), and the server, with S the clients of the round and N all there are, takes

    x <- x + lr_g sum_{i in S} p_i (y_i - x),    c <- c + (|S| / N) mean_{i in S} (c_i+ - c_i),

so that c stays the mean of the c_i. What is averaged here are the entries of A, of B and of all else that is trained,
as in FedIT, whose steps these are while all c are zero: for every client's first round from c = 0.

What differs from the paper:

- Clients weigh by their rows, p_i = n_i / sum n over the round, as in every method here, where the paper weighs all
  alike. c must then be the mean of the c_i by the same weights, or else the fixed point of the rounds is that of
  neither objective. The server keeps sum_i n_i c_i, and divides by the rows of all N clients; those of clients that
  it has not heard of yet count as many as the mean of the others. For equal rows that is the paper's c.
- Clients send y_i alone. c_i+ - c_i = (x - y_i) / (K lr) - c follows from it, so that a round costs what FedIT's
  costs up, and twice that down. A client says K lr, which is the sum of its steps' learning rates where a schedule
  changes them.
- Correction comes after the gradient has been clipped (``train.max_grad_norm``) and FedProx's been added, and c_i is
  the mean of the gradients after these. It needs plain gradient descent: y - x must be K lr times a mean of
  gradients, which it is not with momentum or with Adam, and these are refused. A learning rate for Adam is too small
  for it.
- Each order names the c_i that the server counts, so that a client whose answer came too late, or was refused, goes on
  from the one before. Where a client has lost it (a SuperNode keeps it in memory, and a restart takes it), or counts
  other rows than before, c cannot be the mean of the c_i any more, and would mislead all rounds to come: after that
  round all of them begin again at zero.

Under record-level privacy c_i follows from the x, y_i and c of earlier rounds, all of which the server has: it is
made of what noise was added to already, and correcting by it costs nothing more. Client-level privacy is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.strategies.algebra.means import weighted_mean
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import LINEAR_KINDS, Capabilities, Merging

TOTAL, HEARD, COUNTED = "total.", "heard", "counted"  # in a checkpoint

log = logging.getLogger("flwr")


class ScaffoldOptions(StrategyOptions):
    """Options of ``strategy.name = "scaffold"``."""

    server_learning_rate: float = Field(1.0, gt=0, description="lr_g: how far the server goes towards the mean")


class Scaffold(AdapterStrategy):
    """The weighted mean of clients whose steps are corrected by control variates (arXiv 1910.06378)."""

    name = "scaffold"
    Options = ScaffoldOptions
    options: ScaffoldOptions
    capabilities = Capabilities(
        paper="arXiv 1910.06378",
        sends="Abar, Bbar, c",
        exact=f"only where the update is linear in what is trained ({LINEAR_KINDS})",
        needs_single_factors=False,
        controls=True,
        plain_steps=True,
        updates=None,
        merging=Merging(refused="corrects steps of training, and adapters on disk make none: use a plain mean"),
    )

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._total: dict[str, Tensor] = {}  # sum_i n_i c_i, float64
        self._heard: dict[str, int] = {}  # n_i of each client that has answered
        self._counted: dict[str, int] = {}  # the round that made the c_i that is in the sum, of each client

    def control(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return c."""
        rows = self._rows()
        return {
            name: (self._total[name] / rows).to(tensor) if name in self._total else torch.zeros_like(tensor)
            for name, tensor in trained.items()
        }

    def control_made_in(self, client: str) -> int:
        """Return the round of the client's last answer that counts."""
        return self._counted.get(client, 0)

    def aggregate(self, updates: Iterable[ClientUpdate], current: AdapterState, server_round: int = 1) -> AdapterState:
        """Average the cohort as it arrives, and take in how the control variates moved."""
        x = {name: t for name, t in current.adapter_tensors().items() if name not in self.terms.frozen}
        c = self.control(x)
        total, heard, counted = dict(self._total), dict(self._heard), dict(self._counted)
        lost = list[str]()

        def noted() -> Iterator[ClientUpdate]:
            for update in updates:
                client, rows, rates = update.client_id, update.num_examples, update.metrics.rate_sum
                if update.metrics.control_lost or heard.get(client, rows) != rows:
                    lost.append(client)
                heard[client] = rows
                if rates:  # else the client keeps its c_i
                    counted[client] = server_round
                    y = AdapterState(update.factors, update.dense).adapter_tensors()
                    for name in sorted(x.keys() & y.keys()):
                        moved = (x[name].double() - y[name].double()) / rates - c[name].double()  # c_i+ - c_i
                        total[name] = total.get(name, 0.0) + rows * moved
                yield update

        mean = weighted_mean(noted(), current, self.trains_a)
        if lost:
            log.warning("client %s lost its control variate; all begin again at zero", ", ".join(lost))
            total, counted = {}, {}
        self._total, self._heard, self._counted = total, heard, counted
        rate = self.options.server_learning_rate
        if rate == 1.0:
            return mean
        tensors = mean.to_tensors()
        for name, start in x.items():
            tensors[name] = (start.double() + rate * (tensors[name].double() - start.double())).to(start)
        scaling = next((f.scaling for f in current.factors.values()), self.terms.scaling)
        return AdapterState.from_tensors(tensors, scaling)

    def _rows(self) -> float:
        """Return the rows of all clients, of whom those that were not heard of yet have as many as the others."""
        if not self._heard:
            return 1.0
        return sum(self._heard.values()) / len(self._heard) * max(self.clients, len(self._heard))

    def memory(self) -> dict[str, Tensor]:
        """Return the sum of the control variates, which are in it, and whose rows are known."""
        if not self._heard:
            return {}
        words = {HEARD: self._heard, COUNTED: self._counted}
        texts = {
            name: torch.tensor(list(json.dumps(of, ensure_ascii=False).encode()), dtype=torch.uint8)
            for name, of in words.items()
        }
        return {**texts, **{TOTAL + name: tensor for name, tensor in self._total.items()}}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Take up what `memory` returned."""
        self._total = {name.removeprefix(TOTAL): tensor for name, tensor in memory.items() if name.startswith(TOTAL)}
        self._heard, self._counted = (
            json.loads(bytes(memory[name].tolist())) if name in memory else {} for name in (HEARD, COUNTED)
        )
