"""What the frozen base's dropout, and batches of like lengths, do to accuracy: three tasks, one thread, in one process.

    python -m benchmarks.dropout [--seeds 0 1 2] [--tasks digits docstrings topics] [--topics WHEEL] [--json FILE]

Each run is a preset's own, but for the two keys and ``train.precision = "bf16"`` on texts. `topics` asks all-MiniLM
which of six topics a question is from, label-skewed over six clients; its rows are of chatterbot-corpus 1.3.3 (BSD),
whose wheel is named: ``pip download chatterbot-corpus==1.3.3 --no-deps``. Dropout is 0.1 or 0 in all of the base.
A figure is the mean over seeds, and its standard deviation.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from fedpeft.chatter import silence
from fedpeft.config import configure
from fedpeft.simulations.simulate import simulate

ARMS: dict[str, dict[str, Any]] = {
    "dropout 0.1": {"model.dropout": 0.1, "train.bucket": 1},
    "dropout 0": {"model.dropout": 0.0, "train.bucket": 1},
    "dropout 0, bucket 8": {"model.dropout": 0.0, "train.bucket": 8},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {},
    "docstrings": {"train.precision": "bf16", "data.max_length": 128},
    "topics": {"train.precision": "bf16", "federation.clients": 6, "data.max_length": 32},
}
ENGLISH, TOPICS = "chatterbot_corpus/data/english/", 6


def write_topics(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write the questions of the largest topics as two tables, and return where they are."""
    rows = set()
    with zipfile.ZipFile(wheel) as held:
        for name in sorted(each for each in held.namelist() if each.startswith(ENGLISH)):
            for talk in yaml.safe_load(held.read(name))["conversations"]:
                rows.add((str(talk[0]), Path(name).stem))
    largest = [topic for topic, _ in Counter(topic for _, topic in rows).most_common(TOPICS)]
    kept = sorted(row for row in rows if row[1] in largest)
    order = np.random.default_rng(0).permutation(len(kept))
    parts = {"test": order[: len(kept) // 4], "train": order[len(kept) // 4 :]}
    for part, indices in parts.items():
        with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *(kept[index] for index in indices)])
    return {"data.source": str(folder / "train.csv"), "data.test": str(folder / "test.csv")}


def run(task: str, settings: dict[str, Any]) -> dict[str, float]:
    """Simulate once; return the last accuracy, the last loss and the seconds of training."""
    preset = "digits" if task == "digits" else "docstrings"
    common = {"simulation.workers": 0, "run.evaluate_every": 100}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        started = time.process_time()
        simulate(configure({**common, **settings}, preset=preset), path)
        seconds = time.process_time() - started
        events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "evaluate"][-1]
    return {"accuracy": last["accuracy"], "loss": last["loss"], "cpu_seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), default=["digits", "docstrings"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--topics", type=Path, metavar="WHEEL")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if "topics" in options.tasks and options.topics is None:
        parser.error("task topics needs --topics WHEEL")
    silence()
    torch.set_num_threads(1)
    table = Table("task", "arm", "accuracy", "loss", "CPU seconds")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for task in options.tasks:
            given = write_topics(options.topics, Path(folder)) if task == "topics" else {}
            given |= {"federation.rounds": options.rounds} if options.rounds else {}
            for arm, keys in ARMS.items():
                if task == "digits" and keys["train.bucket"] > 1:
                    continue  # images are as long as each other
                runs = [run(task, SETTINGS[task] | given | keys | {"run.seed": seed}) for seed in options.seeds]
                rows.append({"task": task, "arm": arm, "runs": runs})
                cells = []
                for name in ("accuracy", "loss", "cpu_seconds"):
                    values = [each[name] for each in runs]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
                table.add_row(task, arm, *cells)
                print(task, arm, *cells, flush=True)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"seeds": options.seeds, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
