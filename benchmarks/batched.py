"""Many tiny clients in a round: trained together against one by one, the whole round included.

    python -m benchmarks.batched [--clients 1000] [--sizes 8 32] [--pairs 3] [--json FILE]

A client makes 2 steps of 4 x 16 tokens with LoRA and a head on a BERT of width 64, made up here; what it costs is
mostly the handling of its message and of many small tensors. Timed is the CPU time of a second round, in this process
and on one thread: messages, training, replies, checks and the mean. The two take turns; a figure is the median of the
ratios.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpeft.chatter import silence
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.runs import Event
from fedpeft.simulations.simulate import simulate

TARGET = 5.0
WORDS = [f"w{index}" for index in range(60)]
STEPS, BATCH, TOKENS, WIDTH = 2, 4, 16, 64


def make_model(folder: Path, *, width: int = WIDTH) -> None:
    """Write a BERT of two layers without dropout, drawn at random, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(1)
    BertModel(
        BertConfig(
            vocab_size=len(WORDS) + 2,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def make_rows(path: Path, clients: int) -> None:
    """Write each client's rows, and a few that are held out."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "client"])
        for index in range(clients * (STEPS * BATCH + 1)):
            label = draw.randrange(2)
            words = draw.choices(WORDS[:30] if label else WORDS[30:], k=TOKENS)
            writer.writerow([" ".join(words), "yes" if label else "no", f"client-{index % clients}"])


def configuration(folder: Path, size: int | str) -> RunConfig:
    """Return the run, whose workers train so many clients at a time."""
    settings: dict[str, Any] = {
        "model.name": str(folder / "model"),
        "data.source": str(folder / "rows.csv"),
        "partition.by": "client",
        "adapter.rank": 4,
        "train.local_steps": STEPS,
        "train.batch_size": BATCH,
        "strategy.name": "fedit",
        "federation.rounds": 2,
        "run.evaluate_every": 2,
        "simulation.workers": 0,
        "simulation.batch_clients": size,
    }
    return resolve([nest(settings)])


def round_seconds(config: RunConfig) -> float:
    """Return the CPU seconds of a run's second round."""
    stamps: list[float] = []

    def listen(event: Event) -> None:
        if event["event"] == "round":
            stamps.append(time.process_time())

    with tempfile.TemporaryDirectory() as out:
        simulate(config, Path(out) / "run", listener=listen)
    return stamps[1] - stamps[0]


def measure(clients: int, sizes: Sequence[int], pairs: int) -> dict[str, Any]:
    """Return the ratios, and what was measured on."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model")
        make_rows(folder / "rows.csv", clients)
        seconds: dict[str, list[float]] = {"off": [], **{str(size): [] for size in sizes}}
        for _ in range(pairs):
            for name in seconds:
                size = name if name == "off" else int(name)
                seconds[name].append(round_seconds(configuration(folder, size)))
    ratios = {
        name: statistics.median(alone / taken for alone, taken in zip(seconds["off"], own, strict=True))
        for name, own in seconds.items()
        if name != "off"
    }
    return {
        "benchmark": "batched",
        "clients": clients,
        "cpu_milliseconds_a_client": {name: 1e3 * statistics.median(own) / clients for name, own in seconds.items()},
        "times_faster": ratios,
        "target": TARGET,
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    silence()
    found = measure(given.clients, given.sizes, given.pairs)
    for name, milliseconds in found["cpu_milliseconds_a_client"].items():
        gain = f", {found['times_faster'][name]:.1f} times as fast" if name != "off" else ""
        print(f"batch_clients = {name:>3}: {milliseconds:6.2f} ms of CPU time a client{gain}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
