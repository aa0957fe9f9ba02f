"""The whole job against a plain Flower + PEFT application: same rows, same clients, same steps, from command to end.

    python -m benchmarks.peer [--heads pooler classifier] [--rounds 5] [--longer 10] [--quick] [--json FILE]

The application is `benchmarks.peer_app`. It runs once a head, for ``--longer`` rounds: its learning rate is constant,
so that its first ``--rounds`` are a job of their own, whose time is that until their end and what comes after the last
round. `fedpeft simulate` is timed alike. Both score the server's model on the same test rows after each round.

``classifier`` trains what PEFT trains unless told otherwise, the classifier; ``pooler`` the pooler as well, which
all-MiniLM ships as it was drawn. fedpeft finds that by itself.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict

from benchmarks.job import LENGTH, Simulated, Work, here, job, listened, simulated
from benchmarks.record import ROOT, Figure, machine, parser, publish, variables
from benchmarks.tiny import write_model, write_rows
from fedpeft.presets import is_preset, materialize

HEADS = {"pooler": ["classifier", "pooler"], "classifier": ["classifier"]}
FAST = 6.0 if torch.cpu._is_amx_tile_supported() else 3.0 if torch.cpu._is_avx512_bf16_supported() else None


def settings(work: Work, head: str, rounds: int) -> dict[str, Any]:
    """Return what the application is told, so that it does the same work."""
    home = work.home()
    config = home.config
    assert config.data.source is not None
    name = config.data.source
    data = str(materialize(name.removeprefix("preset:")).data) if is_preset(name) else name
    return {
        "model": str(home.folder),
        "data": data,
        "partitions": [rows.tolist() for rows in home.partition.indices],
        "num_labels": len(home.labels),
        "max_length": config.data.max_length,
        "rounds": rounds,
        "local_steps": config.train.local_steps,
        "batch_size": config.train.batch_size,
        "learning_rate": config.train.learning_rate,
        "seed": config.run.seed,
        "head": HEADS[head],
        "cores": os.cpu_count(),
    }


def plain(given: Mapping[str, Any]) -> Simulated:
    """Run the application in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="peer-app-") as folder:
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(given))
        command = [sys.executable, "-m", "benchmarks.peer_app", str(path)]
        return listened(command, Path(folder), PYTHONPATH=str(ROOT))


def plain_here(given: Mapping[str, Any]) -> Simulated:
    """Run the application in this process, on our grid in place of Flower's."""
    from benchmarks.peer_app import client_app, server_app, task
    from fedpeft.simulations.grids.inline import InlineGrid

    events: list[dict[str, Any]] = []
    started = time.perf_counter()

    def note(event: dict[str, Any]) -> None:
        events.append({**event, "at": time.perf_counter() - started})

    nodes = range(1, len(given["partitions"]) + 1)
    contexts = {node: Context(1, node, {"partition-id": node - 1}, RecordDict(), {}) for node in nodes}
    with tempfile.TemporaryDirectory(prefix="peer-app-") as folder:
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(given))
        with variables(**{task.VARIABLE: str(path)}):
            task.settings.cache_clear()
            task.load_rows.cache_clear()
            server_app.serve(InlineGrid(client_app.app, contexts), note)
    return Simulated(time.perf_counter() - started, events, 1, 1)


def first_at(run: Simulated, accuracy: float) -> float | None:
    """Return when a run first scored so much, in seconds since its command."""
    times = [run.at[number] for number, score in run.accuracy.items() if score >= accuracy and number > 0]
    return min(times, default=None)


def compared(name: str, ours: Simulated, peer: Simulated, rounds: int, target: float | None) -> list[Figure]:
    """Return the figures of one of our runs beside one of the application's."""
    times = {"ours_s": ours.whole(rounds), "peer_s": peer.whole(rounds)}
    scores = {"ours": ours.accuracy[rounds], "peer": peer.accuracy[rounds]}
    memory = {"ours_gb": ours.peak / 1e9, "peer_gb": peer.peak / 1e9}
    last = peer.accuracy[max(peer.accuracy)]
    reached = first_at(ours, last)
    found = [
        Figure(f"{name}: job of {rounds} rounds", times["peer_s"] / times["ours_s"], target=target, detail=times),
        Figure(f"{name}: accuracy above the application's", scores["ours"] - scores["peer"], "", 0.0, detail=scores),
        Figure(f"{name}: peak memory against the application", ours.peak / peer.peak, detail=memory),
    ]
    if reached is not None:
        detail = {"accuracy": last, "ours_s": reached, "peer_s": max(peer.at.values())}
        what = f"{name}: time to its accuracy after {max(peer.at)} rounds"
        found.append(Figure(what, detail["peer_s"] / reached, target=5.0, detail=detail))
    return found


def series(run: Simulated) -> dict[str, Any]:
    """Return what can be drawn of a run."""
    return {"wall_s": run.wall, "at_s": list(run.at.values()), "accuracy": list(run.accuracy.values())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, print, and write."""
    given_options = parser(__doc__)
    given_options.add_argument("--heads", nargs="+", choices=HEADS, default=["pooler"])
    given_options.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    given_options.add_argument("--steps", type=int, default=10, help="of each client in a round")
    given_options.add_argument("--rounds", type=int, default=5, help="of the job")
    given_options.add_argument("--longer", type=int, default=10, help="rounds of the application")
    given = given_options.parse_args(arguments)
    before = machine()
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        rounds, longer, works = given.rounds, given.longer, {}
        for precision in given.precisions:
            works[precision] = job(rounds if precision == "fp32" else longer, precision).but(
                train__local_steps=given.steps
            )
        if given.quick:
            rounds = longer = 1
            works = {"fp32": small(Path(folder))}
        first = next(iter(works.values()))
        run_ours, run_peer = (here, plain_here) if given.quick else (simulated, plain)
        ours = {precision: run_ours(work) for precision, work in works.items()}
        peers = {head: run_peer(settings(first, head, longer)) for head in given.heads}
    figures = []
    for head, peer in peers.items():
        for precision, run in ours.items():
            target = 1.6 if precision == "fp32" else FAST
            figures += compared(f"{precision} against a trained {head}", run, peer, rounds, target)
    runs = {f"fedpeft {name}": series(run) for name, run in ours.items()}
    runs |= {f"Flower + PEFT, {name} trained": series(run) for name, run in peers.items()}
    publish("peer", figures, given, before, runs=runs, padded_to=LENGTH)


def small(folder: Path) -> Work:
    """Return work that takes seconds."""
    return Work(
        {
            "model.name": str(write_model(folder / "model")),
            "model.task": "sequence-classification",
            "data.source": str(write_rows(folder / "rows", 24)),
            "data.text": "text",
            "data.label": "label",
            "data.max_length": 16,
            "partition.scheme": "iid",
            "adapter.targets": ["query", "value"],
            "train.local_steps": 1,
            "train.batch_size": 4,
            "federation.clients": 2,
            "federation.rounds": 1,
            "strategy.name": "fedit",
            "simulation.workers": 0,
        }
    )


if __name__ == "__main__":
    main()
