"""Who is told how a run goes while it goes: records, books, progress, checkpoints and trackers are a `Watcher` each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedpeft.adapters.state import AdapterState, ClientUpdate
from fedpeft.strategies.rounds.report import RoundReport


class Watcher:
    """Told of what happens in a run, in the order in which it happens; does nothing unless it says so.

    What a watcher raises ends the run.
    """

    def round_begins(self, server_round: int) -> None:
        """Hear that a round begins, before a cohort is drawn or anybody is asked."""

    def update_arrived(self, server_round: int, update: ClientUpdate) -> None:
        """Hear of a client's good update, without its tensors; never where single clients are protected."""

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        """Hear that a round is done, and which adapter the next one begins with."""

    def round_broken(self, report: RoundReport, error: BaseException) -> None:
        """Hear that a round in which clients were asked came to no end, and why."""

    def round_closed(self, server_round: int) -> None:
        """Hear that all of a round is on record, its scores included where it is evaluated."""

    def scored(self, server_round: int, metrics: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Hear how good the adapter is after a round, or before the first one (0): over all, and broken down."""

    def memory(self) -> dict[str, Any]:
        """Return what it remembers from round to round, as plain JSON, for checkpoints."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that it remembers from round to round, for checkpoints; one watcher of a run may."""
        return {}

    def recall_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` returned, after `resumed`; called where there are any."""

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Hear that a run goes on after a round, with which adapter; take up what `memory` returned then."""

    def ended(self, error: BaseException | None) -> None:
        """Hear that there are no more rounds; because of an error, if there is one."""
