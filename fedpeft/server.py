"""The Flower ServerApp: a whole run on real SuperNodes, as `fedpeft simulate` does it in one place.

The run config that ``flwr run`` brings is the resolved configuration (``section.key`` each) and ``deployment.out``, the
run directory on this machine; `fedpeft deploy init` writes both.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft.chatter import silence
from fedpeft.deployment import split_run_config
from fedpeft.errors import DeploymentError
from fedpeft.presets import provenance
from fedpeft.privacy.books import Books
from fedpeft.resident import resident
from fedpeft.rounding import upwards
from fedpeft.runs import Event, RunDirectory, check_vacant
from fedpeft.strategies import find, with_typed_options
from fedpeft.strategies.ending import check_ending
from fedpeft.strategies.federation import exported_bytes, federate

log = logging.getLogger("flwr")

app = ServerApp()

POLL_SECONDS = 1.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the nodes, run all rounds, and write the run directory."""
    silence()
    config, out = split_run_config(context.run_config)
    config = with_typed_options(config, rng="secure")
    check_vacant(out)
    home = resident(config)
    check_ending(config, home)
    expected = len(home.partition.client_ids) if config.federation.clients is None else config.federation.clients
    adapter_bytes = exported_bytes(find(config.strategy.name), home.adapted)
    directory = RunDirectory(out, config, adapter_bytes, {"presets": provenance(config.presets)})
    for note in home.adapted.notes:
        _log_event({"event": "note", "message": note})
    _wait_for_nodes(grid, expected, config.federation.round_timeout)
    books = Books(config, directory, {}, told=True) if config.privacy.is_private else None
    timeout = config.federation.round_timeout
    outcome = federate(config, grid, directory, listener=_log_event, timeout=timeout, books=books)
    if outcome.error is not None:
        raise outcome.error
    print(f"run directory: {Path(out).resolve()}", flush=True)


def _wait_for_nodes(grid: Grid, expected: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while (online := len(list(grid.get_node_ids()))) < expected:
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"{online} of {expected} nodes are online after {timeout:.0f} s; start the others, "
                "or lower federation.clients."
            )
        time.sleep(POLL_SECONDS)


def _log_event(event: Event) -> None:
    """Print what a person watching ``flwr log`` wants to see."""
    if event["event"] in ("round", "evaluate", "fault", "note", "warning", "privacy", "end"):
        shown = {key: value for key, value in event.items() if not isinstance(value, dict)}
        print(
            " ".join(f"{key}={_shown(key, value)}" for key, value in shown.items()),
            flush=True,
        )


def _shown(key: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return upwards(value, digits=4) if "epsilon" in key else f"{value:.4f}"
