"""A small Llama that is taught a lookup table by three clients, once for all tests of what it writes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fedpeft.config import RunConfig, nest, resolve

KEYS = 24
# of lm-eval, that asks the model as a run does; ROWS stands for a file
TASK = """
task: table
dataset_path: json
dataset_kwargs:
  data_files:
    test: ROWS
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}\\n"
doc_to_target: "{{completion}}"
generation_kwargs:
  until: ["[EOS]"]
  max_gen_toks: 4
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="session")
def table_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values, eight at each of three clients."""
    path = tmp_path_factory.mktemp("table") / "table.jsonl"
    values = list(range(KEYS, 2 * KEYS))
    random.Random(0).shuffle(values)
    with path.open("w") as file:
        for key, value in enumerate(values):
            row = {"prompt": f"w{key} w{55 + key % 3}", "completion": f"w{value} w{value // 2}", "site": f"s{key % 3}"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def table_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn with large weights: an adapter learns what it is taught through features that tell keys apart."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("table-llama")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=63,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    # as many folders on the hub say, and nobody who scores wants
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def table_config(table_llama: Path, table_jsonl: Path) -> RunConfig:
    settings = {
        "model.name": str(table_llama),
        "model.task": "causal-lm",
        "data.source": str(table_jsonl),
        "data.test": str(table_jsonl),
        "data.prompt": "prompt",
        "data.completion": "completion",
        "data.metric": "exact_match,f1",
        "data.max_new_tokens": 4,
        "partition.by": "site",
        "adapter.kind": "lora",
        "adapter.rank": 16,
        "adapter.alpha": 32.0,
        "adapter.targets": ["all-linear"],
        "train.local_steps": 10,
        "train.batch_size": 8,
        "train.learning_rate": 0.005,
        "federation.rounds": 7,
        "run.evaluate_every": 7,
        "run.generate": 3,
        "run.evaluate_clients": True,
        "run.aggregation_error": False,
        "strategy.name": "fedit",
        "simulation.workers": 0,
    }
    return resolve([nest(settings)])


@pytest.fixture(scope="session")
def taught(table_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a federation that learned the table."""
    from fedpeft.report.page import write_report
    from fedpeft.simulations.simulate import simulate

    out = tmp_path_factory.mktemp("taught") / "run"
    simulate(table_config, out)
    write_report(out)
    return out
