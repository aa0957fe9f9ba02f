"""The books of a simulation: the driver charges every message before a worker is given it, repeats included.

A worker that dies has perhaps released nothing, and perhaps all: its message was charged. Under seeded randomness the
repeat computes the very same numbers, and is on the books already; under secure randomness it is a new release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flwr.app import Message, MessageType

from fedpeft.clients.privacy import data_fingerprint, release
from fedpeft.clients.rows import client_rows
from fedpeft.clients.verdicts import Verdict
from fedpeft.config import RunConfig
from fedpeft.config.federation import MACHINE_KEYS
from fedpeft.privacy.budget import Budget, Limit, charged
from fedpeft.privacy.ledger import Entry, Ledger
from fedpeft.privacy.levels import level_of
from fedpeft.resident import Resident
from fedpeft.simulations.grids.base import SimulationGrid
from fedpeft.wire import TrainOrder


class Charging:
    """A grid's ``on_dispatch`` under record-level privacy.

    Parameters
    ----------
    config : RunConfig
        The run.
    home : Resident
        Its rows.
    grid : SimulationGrid
        Where clients' contexts are.
    client_ids : mapping of int to str
        By node id.
    ledger : Ledger
        The run's.
    run : str
        Its name on the books.
    """

    def __init__(
        self,
        config: RunConfig,
        home: Resident,
        grid: SimulationGrid,
        client_ids: Mapping[int, str],
        ledger: Ledger,
        run: str,
    ) -> None:
        self._config, self._home, self._grid, self._ledger, self._run = config, home, grid, ledger, run
        self._released = _as_released(config)
        self._client_ids = client_ids
        self._budget = Budget.of(config.privacy)
        self._data: dict[int, str] = {}

    def __call__(self, node: int, message: Message) -> Verdict | None:
        """Charge a training message; tell the client what came of it."""
        if message.metadata.message_type != MessageType.TRAIN:
            return None
        order = TrainOrder.from_record(message.content)
        context, privacy = self._grid.contexts[node], self._config.privacy
        rows = client_rows(self._home, context.node_config)
        mechanism = level_of(privacy).client_mechanism(self._config, rows.num_examples)
        if node not in self._data:
            self._data[node] = data_fingerprint(self._home, rows, context.node_config)
        entry = Entry(
            run=self._run,
            client=self._client_ids[node],
            round=order.server_round,
            noise_multiplier=mechanism.noise_multiplier,
            sample_rate=mechanism.sample_rate,
            steps=mechanism.steps,
            release=release(order, context, self._released, self._data[node]) if privacy.rng == "seeded" else "",
        )
        federation = self._config.federation
        planned = replace(mechanism.charge, steps=mechanism.steps * (federation.rounds + privacy.spare_rounds))
        limits = [] if self._budget is None else [Limit(self._budget, entry.client, planned=planned)]
        if not charged(self._ledger, entry, limits):
            return Verdict(allowed=False)
        return Verdict(allowed=True, noise_multiplier=mechanism.noise_multiplier)


def _as_released(config: RunConfig) -> RunConfig:
    """Return a configuration as far as numbers follow from it, whatever a run that goes on was told to change."""
    keeping = ("checkpoint_every", "keep_checkpoints")
    return config.model_copy(
        update={
            "simulation": config.simulation.model_copy(update=dict.fromkeys(MACHINE_KEYS)),
            "run": config.run.model_copy(update=dict.fromkeys(keeping, 1)),
        }
    )
