"""When a checkpoint is written, and of which round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedpeft.runs import EVENTS
from fedpeft.strategies.rounds.checkpoints import CLIENTS, Checkpoints
from fedpeft.strategies.rounds.memory import Memory


class Folder:
    """Takes the place of a run directory that keeps two checkpoints, and may have no room."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self.there: list[int] = []
        self.is_full = False
        self.events_size = 0

    def checkpoint(self, server_round: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> list[int]:
        if not self.is_full:
            self.saved.append((server_round, facts))
            self.there = [*self.there, server_round][-2:]
        return self.there


class States:
    """Clients that keep another state after every round."""

    def __init__(self) -> None:
        self.taken = 0
        self.kept: list[Mapping[str, str]] = []

    def snapshot(self) -> Mapping[str, str]:
        self.taken += 1
        return {"0": f"version {self.taken}"}

    def forget(self, kept: Iterable[Mapping[str, str]]) -> None:
        self.kept = list(kept)


def keeper(every: int, last: int) -> tuple[Checkpoints, Folder, States]:
    folder, states = Folder(), States()
    memory = Memory({"x": torch.ones(1)}, {"remembered": 1})
    return Checkpoints(folder, every, last, lambda: memory, states, {"own": 2}), folder, states  # type: ignore[arg-type]


def close(watcher: Checkpoints, folder: Folder, rounds: Iterable[int]) -> None:
    for server_round in rounds:
        folder.events_size = 100 * server_round
        watcher.round_closed(server_round)


def test_a_checkpoint_is_saved_every_few_rounds_and_after_the_last() -> None:
    watcher, folder, _ = keeper(2, 5)
    close(watcher, folder, range(1, 6))
    watcher.ended(None)
    assert [number for number, _ in folder.saved] == [2, 4, 5]
    assert folder.saved[0][1] == {"own": 2, "remembered": 1, EVENTS: 200, CLIENTS: {"0": "version 2"}}


def test_a_run_that_is_interrupted_saves_the_last_round_that_was_over_with_what_was_on_record_then() -> None:
    watcher, folder, _ = keeper(5, 9)
    close(watcher, folder, (1, 2, 3))
    folder.events_size = 1000  # of the round that is broken off
    watcher.ended(KeyboardInterrupt())
    assert [(number, facts[EVENTS], facts[CLIENTS]) for number, facts in folder.saved] == [(3, 300, {"0": "version 3"})]


def test_states_of_clients_stay_as_long_as_a_checkpoint_names_them_or_one_is_to_be_written() -> None:
    watcher, folder, states = keeper(1, 9)
    close(watcher, folder, (1, 2, 3))
    assert states.kept == [{"0": "version 2"}, {"0": "version 3"}]
    folder.is_full = True
    close(watcher, folder, (4,))
    assert states.kept == [{"0": "version 2"}, {"0": "version 3"}, {"0": "version 4"}]
    folder.is_full = False
    watcher.ended(KeyboardInterrupt())
    assert folder.there == [3, 4]


def test_states_of_clients_do_not_pile_up_between_checkpoints() -> None:
    watcher, folder, states = keeper(4, 9)
    close(watcher, folder, range(1, 8))
    assert folder.there == [4]
    assert states.kept == [{"0": "version 4"}, {"0": "version 7"}]
