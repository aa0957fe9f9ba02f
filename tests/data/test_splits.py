"""Encoded rows, and the batches that are made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data.splits import EncodedSplit


@pytest.fixture(scope="module")
def train() -> EncodedSplit:
    """Six rows of tokens, of lengths 1 to 6, in two domains."""
    tokens = torch.arange(10, 31, dtype=torch.int32)
    offsets = torch.tensor([0, 1, 3, 6, 10, 15, 21])
    stored = {
        "tokens": tokens,
        "offsets": offsets,
        "labels": torch.arange(6),
        "domains": torch.tensor([0, 1, 1, 0, 1, 0]),
    }
    return EncodedSplit("any", stored, {"domains": ("north", "south")}, pad_token_id=0)


def test_taking_rows_is_the_same_as_indexing_them(train: EncodedSplit) -> None:
    some = train.take([5, 1, 3]).take([2, 0])
    assert len(some) == 2
    assert torch.equal(some.batch([0, 1])["input_ids"], train.batch([3, 5])["input_ids"])
    assert train.domains is not None
    assert some.domains == (train.domains[3], train.domains[5])
    assert some.lengths.tolist() == train.lengths[[3, 5]].tolist()


def test_an_empty_batch_has_no_rows(train: EncodedSplit) -> None:
    batch = train.batch([])
    assert {name: len(value) for name, value in batch.items()} == dict.fromkeys(batch, 0)


@given(data=st.data())
@settings(max_examples=50)
def test_padding_and_masks_follow_from_the_rows_alone(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=6))
    prompts = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    stored = {
        "tokens": torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        "offsets": torch.from_numpy(offsets),
        "counted": torch.tensor(
            [at >= p for row, p in zip(rows, prompts, strict=True) for at in range(len(row))]
        ).byte(),
    }
    split = EncodedSplit("causal-lm", stored, pad_token_id=3)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    width = max(len(rows[i]) for i in chosen)
    batch = split.batch(chosen)
    assert batch["input_ids"].tolist() == [rows[i] + [3] * (width - len(rows[i])) for i in chosen]
    assert batch["attention_mask"].tolist() == [[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in chosen]
    assert batch["labels"].tolist() == [
        [-100] * prompts[i] + rows[i][prompts[i] :] + [-100] * (width - len(rows[i])) for i in chosen
    ]
