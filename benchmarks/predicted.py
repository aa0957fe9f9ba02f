"""What a worker takes at its peak, measured and as it was predicted: precisions, quantised bases, optimisers.

    python -m benchmarks.predicted [--width 576] [--depth 30] [--length 256] [--rows 8] [--only NAME ...]
                                   [--quick] [--json FILE]

A Llama of random weights, as large as SmolLM2-135M unless asked otherwise, and rows of full length. Each case is a
whole `fedpeft simulate --workers 0` of one client and two steps in a process of its own, run once before so that a
base is converted or quantised already; its peak is what ``environment.json`` would say. The prediction is that of
``--dry-run``. A case that needs a package that is missing is left out, and said.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.job import CommandError
from benchmarks.record import Figure, machine, parser, publish
from benchmarks.tiny import WORDS
from fedpeft.config import configure
from fedpeft.resident import Resident
from fedpeft.simulations.plan import predicted

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, checkpointing": {"train.gradient_checkpointing": True},
    "fp32, record level": {"privacy.level": "record", "privacy.noise_multiplier": 1.0},
    "bf16": {"train.precision": "bf16"},
    "bf16, checkpointing": {"train.precision": "bf16", "train.gradient_checkpointing": True},
    "nf4": {"model.quantization": "nf4"},
    "nf4, bf16, checkpointing": {
        "model.quantization": "nf4",
        "train.precision": "bf16",
        "train.gradient_checkpointing": True,
    },
    "int8": {"model.quantization": "int8"},
    "int8-weight-only": {"model.quantization": "int8-weight-only"},
    "all-linear, rank 64, adamw": {"adapter.targets": "all-linear", "adapter.rank": 64},
    "all-linear, rank 64, lion": {"adapter.targets": "all-linear", "adapter.rank": 64, "train.optimizer": "lion"},
    "all-linear, rank 64, adafactor": {
        "adapter.targets": "all-linear",
        "adapter.rank": 64,
        "train.optimizer": "adafactor",
    },
    "all-linear, rank 64, adamw-8bit": {
        "adapter.targets": "all-linear",
        "adapter.rank": 64,
        "train.optimizer": "adamw-8bit",
    },
    "scoring": {"train.batch_size": 1},
}
PHYSICAL = "privacy.physical_batch_size"  # rows that a private step holds: those of a batch that is drawn vary
NEEDS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8-weight-only": "torchao"}
PRIVATE = "fp32, record level"
ASK = """
import sys
from pathlib import Path
from fedpeft.config import configure, parse_overrides, resolve
from fedpeft.runs.machine import footprint
from fedpeft.simulations.simulate import simulate
simulate(resolve([parse_overrides(sys.argv[2:])]), Path(sys.argv[1]) / "run")
found = footprint()
print(found.own + found.shared)
"""


def write_base(folder: Path, width: int, depth: int, vocabulary: int, length: int) -> Path:
    """Write a Llama of random weights, of SmolLM2's proportions, whose tokenizer knows sixty words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    heads = max(1, width // 64)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    ids = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    ).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, length: int) -> Path:
    """Write texts of more words than a row may have tokens."""
    text = " ".join(WORDS[index % len(WORDS)] for index in range(length + 8))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(count)), encoding="utf-8")
    return path


def measure(settings: Mapping[str, Any]) -> int:
    """Run a simulation twice, in processes of their own, and return the second's peak in bytes.

    Raises
    ------
    CommandError
        The run failed.
    """
    words = [f"{key}={value}" for key, value in settings.items()]
    for _ in range(2):
        with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
            done = subprocess.run([sys.executable, "-c", ASK, folder, *words], capture_output=True, text=True)
        if done.returncode:
            raise CommandError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    options = parser(__doc__)
    for name, default in (("width", 576), ("depth", 30), ("vocabulary", 49152), ("length", 256), ("rows", 8)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    given = options.parse_args(arguments)
    before = machine()
    if given.quick:
        given.width, given.depth, given.vocabulary, given.length, given.rows = 64, 2, 500, 32, 4
        given.only = given.only[:1]
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as folder:
        base = write_base(Path(folder) / "base", given.width, given.depth, given.vocabulary, given.length)
        rows = write_rows(Path(folder) / "rows.jsonl", 2 * given.rows, given.length)
        tests = write_rows(Path(folder) / "test.jsonl", 2 * given.rows, given.length)
        shared = {
            "model.name": base,
            "data.source": rows,
            "data.test": tests,
            "model.task": "causal-lm",
            "data.text": "text",
            "data.max_length": given.length,
            "train.batch_size": given.rows,
            "federation.clients": 1,
            "federation.rounds": 1,
            "train.local_steps": 2,
            "run.evaluate_batch_size": given.rows,
            "simulation.workers": 0,
        }
        for name in given.only:
            settings = {**shared, **CASES[name]}
            if name == PRIVATE:
                settings[PHYSICAL] = given.rows
            if (needed := NEEDS.get(name.partition(",")[0])) and importlib.util.find_spec(needed) is None:
                print(f"{name}: left out, since {needed} is not installed")
                continue
            found += figures(name, settings)
    publish("predicted", found, given, before)


def figures(name: str, settings: Mapping[str, Any]) -> list[Figure]:
    """Measure a case and predict it."""
    taken = measure(settings)
    config = configure({key: str(value) for key, value in settings.items()})
    prediction = predicted(config, Resident(config))
    assert prediction is not None
    print(f"{name}: {taken / 1e6:.0f} MB, predicted {prediction.total / 1e6:.0f}: {prediction.to_dict()}", flush=True)
    share = prediction.total / taken
    return [
        Figure(f"{name}: measured", taken / 1e6, "MB"),
        Figure(f"{name}: predicted", prediction.total / 1e6, "MB"),
        Figure(f"{name}: predicted over measured", share, "x"),
    ]


if __name__ == "__main__":
    main()
