"""When a run ends before its last round, and which of its adapters was the best: by scores, and by what was moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedpeft.adapters.state import AdapterState
from fedpeft.strategies.rounds.report import RoundReport
from fedpeft.strategies.rounds.watchers import Watcher
from fedpeft.tasks.metrics import find

MEGABYTE = 10**6


class EarlyEndError(Exception):
    """A run that is over before its last round, as its configuration asks; the text says why."""


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Tell whether a score is an improvement; equal ones, and what is no number, are none."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value > best if find(metric).better == "higher" else value < best


class Patience(Watcher):
    """Ends a run once so many evaluated rounds have brought no improvement.

    Parameters
    ----------
    metric : str
        Of the test rows.
    rounds : int
        How many evaluated rounds after the best one, or after the start.
    """

    def __init__(self, metric: str, rounds: int) -> None:
        self.metric, self.rounds = metric, rounds
        self.best: float | None = None
        self.best_round, self.waited = 0, 0

    def is_over_with(self, server_round: int, metrics: Mapping[str, float]) -> bool:
        """Tell whether the run ends with a round that is scored so."""
        better = is_better(self.metric, float(metrics[self.metric]), self.best)
        return server_round > 0 and not better and self.waited + 1 >= self.rounds

    def scored(self, server_round: int, metrics: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Compare with the best so far."""
        value = float(metrics[self.metric])
        if is_better(self.metric, value, self.best):
            self.best, self.best_round, self.waited = value, server_round, 0
        elif server_round:
            self.waited += 1

    def round_begins(self, server_round: int) -> None:
        """End the run rather than begin a round, if nothing has improved for long enough."""
        if self.waited >= self.rounds:
            best = "never a number" if self.best is None else f"{self.best:.4g} after round {self.best_round}"
            raise EarlyEndError(
                f"{self.metric} has not improved for {self.waited} evaluated rounds (best {best}): run.patience = "
                f"{self.rounds}"
            )

    def memory(self) -> dict[str, Any]:
        """Return the best score and how long ago it was."""
        return {"best": self.best, "round": self.best_round, "waited": self.waited}

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Go on waiting."""
        self.best, self.best_round, self.waited = memory["best"], memory["round"], memory["waited"]


class Budget(Watcher):
    """Ends a run before the round that would move more than it may.

    Parameters
    ----------
    megabytes : float
        What all rounds may move, up and down, of all clients; 10^6 bytes each.
    planned : callable
        Of a round from 1, the bytes that it moves by plan. What the round before moved counts instead, if that was
        more: a base that moves costs more each round, and clients may have to be asked twice.
    """

    def __init__(self, megabytes: float, planned: Callable[[int], int]) -> None:
        self.megabytes, self.planned = megabytes, planned
        self.moved, self.last = 0, 0

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        """Count what was moved."""
        self.last = report.bytes_up + report.bytes_down
        self.moved += self.last

    def is_over_after(self, server_round: int) -> bool:
        """Tell whether no round after this one is paid for."""
        return self.moved + max(self.planned(server_round + 1), self.last) > self.megabytes * MEGABYTE

    def round_begins(self, server_round: int) -> None:
        """End the run rather than begin a round that it cannot pay for."""
        if self.is_over_after(server_round - 1):
            raise EarlyEndError(
                f"round {server_round} would go over run.max_megabytes = {self.megabytes:g}: "
                f"{self.moved / MEGABYTE:.4g} megabytes were moved"
            )

    def memory(self) -> dict[str, Any]:
        """Return what was moved."""
        return {"moved": self.moved, "last": self.last}

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.moved, self.last = memory["moved"], memory["last"]


class Best(Watcher):
    """Holds the adapter of the best evaluated round, the start included, and writes it at the end.

    Parameters
    ----------
    metric : str
        Of the test rows.
    state : AdapterState
        What the run begins with.
    write : callable
        Writes an adapter.
    """

    def __init__(self, metric: str, state: AdapterState, write: Callable[[AdapterState], None]) -> None:
        self.metric, self.write = metric, write
        self.now, self.state = state, state
        self.best: float | None = None
        self.best_round = 0
        self._scalings: Mapping[str, float] = {}

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        """Remember the adapter that is scored next."""
        self.now = state

    def scored(self, server_round: int, metrics: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Hold the adapter if it is the best."""
        value = float(metrics[self.metric])
        if is_better(self.metric, value, self.best):
            self.best, self.best_round, self.state = value, server_round, self.now

    def memory(self) -> dict[str, Any]:
        """Return which round was best."""
        scalings = {layer: factors.scaling for layer, factors in self.state.factors.items()}
        return {"best": self.best, "round": self.best_round, "scalings": scalings}

    def tensors(self) -> dict[str, Tensor]:
        """Return the best adapter."""
        return self.state.to_tensors()

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Go on from the best so far."""
        self.now, self.best, self.best_round = state, memory["best"], memory["round"]
        self._scalings = memory["scalings"]

    def recall_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the best adapter."""
        state = AdapterState.from_tensors(dict(tensors), 1.0)
        factors = {layer: replace(f, scaling=self._scalings[layer]) for layer, f in state.factors.items()}
        self.state = replace(state, factors=factors)

    def ended(self, error: BaseException | None) -> None:
        """Write the best adapter."""
        self.write(self.state)

    @property
    def facts(self) -> dict[str, Any]:
        """What the end of the run says of it."""
        return {"best_round": self.best_round, "best_metric": self.metric, "best_score": self.best}
