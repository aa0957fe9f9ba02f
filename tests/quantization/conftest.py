"""A Llama whose layers are as wide as blocks of 4 bits, and a run of it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.config import RunConfig, nest, resolve
from tests.conftest import WORDS, _tokenizer

Make = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(2)
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2}
    settings: dict[str, Any] = {"vocab_size": 63, "intermediate_size": 128, "max_position_embeddings": 64} | shape | ids
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    rows = tmp_path_factory.mktemp("rows") / "rows.csv"
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "site"])
        writer.writerows([f"{WORDS[i]} {WORDS[i + 1]}", WORDS[2 * i % 50], f"s{i % 2}"] for i in range(24))

    def config(**settings: object) -> RunConfig:
        base = {"model.name": str(llama), "data.source": str(rows), "partition.by": "site", "adapter.rank": 4}
        base |= {"data.prompt": "prompt", "data.completion": "completion", "data.max_length": 16}
        base |= {"federation.rounds": 1, "train.local_steps": 2, "train.batch_size": 4, "simulation.workers": 0}
        base |= {"train.learning_rate": 0.01}
        own = {name.replace("__", "."): value for name, value in settings.items()}
        return resolve([nest(base), nest(own)])

    return config


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, of which one layer each is given 96 numbers, no whole blocks of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(3)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2}
    settings: dict[str, Any] = {"vocab_size": 63, "intermediate_size": 96, "max_position_embeddings": 64} | shape | ids
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    _tokenizer(folder)
    return folder
