"""What becomes of a failure in a simulation: who may know why a client raised, and where its traceback is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flwr.app import Message

from fedpeft.config import RunConfig
from fedpeft.formats import one_line
from fedpeft.privacy.levels import level_of
from fedpeft.runs import Listener, RunDirectory, folder_name
from fedpeft.simulations.grids.inline import InlineGrid
from fedpeft.simulations.grids.ray import RayGrid

WITHHELD = (
    "The text of the error is withheld, since it may quote rows; privacy.release_metrics=true keeps it, and voids the "
    "guarantee."
)


class Failures:
    """Why clients raised and workers died, and who may know it: of private rows, only what cannot quote or count them.

    Parameters
    ----------
    config : RunConfig
        The run.
    directory : RunDirectory
        Keeps the tracebacks.
    grid : InlineGrid or RayGrid
        Knows the causes.
    client_ids : mapping of int to str
        By node id.
    """

    def __init__(
        self, config: RunConfig, directory: RunDirectory, grid: InlineGrid | RayGrid, client_ids: Mapping[int, str]
    ) -> None:
        self._directory, self._grid, self._client_ids = directory, grid, client_ids
        self._nodes = {client: node for node, client in client_ids.items()}
        self._tracebacks: dict[str, Path] = {}
        privacy, level = config.privacy, level_of(config.privacy)
        self._all_may_be_known = level.tells_metrics(privacy)
        self._hides_clients = level.hides_cohort and not self._all_may_be_known  # who took part is on no record
        self._counts_are_public = privacy.public_counts

    def watch(self, listener: Listener) -> None:
        """Take in what fails on the grid from now on, and tell the listener of workers that die."""
        grid = self._grid
        grid.causes.clear()  # of a run before this one
        grid.withholds = not self._all_may_be_known
        grid.on_failure = None if self._hides_clients else self._keep_traceback
        if isinstance(grid, RayGrid):

            def on_worker_death(node: int, deaths: int) -> None:
                whose = "a client" if self._hides_clients else f"client {self._client_ids[node]}"
                message = f"a worker died over {whose} and is replaced ({deaths})"
                listener({"event": "warning", "message": message})

            grid.on_worker_death = on_worker_death

    def _keep_traceback(self, node: int, message: Message, text: str) -> None:
        client = self._client_ids[node]
        name = f"round-{int(message.metadata.group_id or 0):04d}-client-{folder_name(client)}"
        path = self._directory.write_traceback(name, text if self._all_may_be_known else f"{text}{WITHHELD}\n")
        if path is not None:
            self._tracebacks[client] = path

    def explain(self, client: str) -> str:
        """Say why a client raised, to who watches; empty where nothing may be said."""
        cause = self._grid.causes.get(self._nodes[client])
        if cause is None or not (self._all_may_be_known or (cause.quotes_no_row and self._counts_are_public)):
            return ""
        traceback = f" (traceback: {self._tracebacks[client]})" if client in self._tracebacks else ""
        return one_line(cause.text) + traceback
