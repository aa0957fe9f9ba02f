"""Texts, and pairs of them, as tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedpeft.errors import DataError
from fedpeft.tasks.encoding import encode, encode_rows
from tests.tasks.rows import LABELS, MINILM, TEXTS, configure, write_csv


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("max_length", [6, 128])
def test_a_batch_is_what_the_tokenizer_itself_makes_of_its_rows(tmp_path: Path, pair: bool, max_length: int) -> None:
    source = write_csv(tmp_path / "rows.csv", {"text": TEXTS, "other": TEXTS[::-1], "label": LABELS})
    keys = {"data__text_pair": "other"} if pair else {}
    data = encode(configure(source, data__max_length=max_length, **keys), MINILM)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    for split in (data.train, data.test):
        chosen = np.array([3, 0, 3, 2])
        stored = [int(row) for row in np.asarray(split.rows)[chosen]]
        expected = tokenizer(
            [TEXTS[row] for row in stored],
            [TEXTS[::-1][row] for row in stored] if pair else None,
            truncation="longest_first",
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        batch = split.batch(chosen)
        assert batch.keys() == expected.keys() | {"labels"}
        for name, value in expected.items():
            assert torch.equal(batch[name], value), name
        assert [data.labels[label] for label in batch["labels"]] == [LABELS[row] for row in stored]


def test_rows_keep_their_label_domain_and_client(rows_csv: Path) -> None:
    data = encode(configure(rows_csv, data__domain="place", partition__by="who"), MINILM)
    assert data.labels == ("maybe", "no", "yes")
    assert (len(data.train), len(data.test)) == (24, 6)
    assert data.pad_token_id == 0
    for split in (data.train, data.test):
        stored = np.asarray(split.rows)
        assert split.domains == tuple(["north", "south", "east"][row % 3] for row in stored)
        assert split.clients == tuple(["11", "2"][row % 2] for row in stored)
        assert split.labels is not None
        assert [data.labels[label] for label in split.labels] == [LABELS[row] for row in stored]
        assert split.lengths.tolist() == [int(split.batch([i])["attention_mask"].sum()) for i in range(len(split))]


def test_lengths_that_fit_neither_model_nor_tokenizer_are_refused(rows_csv: Path) -> None:
    with pytest.raises(DataError, match=r"data\.max_length = 513, but the model reads 512 tokens"):
        encode(configure(rows_csv, data__max_length=513), MINILM)
    with pytest.raises(DataError, match=r"data\.max_length = 2, but the tokenizer alone adds 2"):
        encode(configure(rows_csv, data__max_length=2), MINILM)


def test_roberta_reads_two_tokens_less_than_it_has_positions(rows_csv: Path, words: Callable[..., Path]) -> None:
    folder = words(None, eos_token="</s>")
    model = {"model_type": "roberta", "max_position_embeddings": 14, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(model))
    assert len(encode(configure(rows_csv, data__max_length=12), folder).train) == 24
    with pytest.raises(DataError, match="reads 12 tokens"):
        encode(configure(rows_csv, data__max_length=13), folder)


def test_a_row_without_tokens_is_named(tmp_path: Path, words: Callable[..., Path]) -> None:
    saved = words(None, eos_token="</s>")
    content = json.loads((saved / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "!"}, "content": ""}
    (saved / "tokenizer.json").write_text(json.dumps(content))
    path = write_csv(tmp_path / "rows.csv", {"text": ["p0", "!!"], "label": ["a", "b"]})
    with pytest.raises(DataError, match=r"row 2 of .* becomes no tokens"):
        encode_rows(configure(path), saved, path)
