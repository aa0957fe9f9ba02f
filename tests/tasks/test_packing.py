"""Packed rows: placed in one way, kept apart, and refused where a model or a privacy level does not keep them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from fedpeft.config import nest, resolve
from fedpeft.errors import AdapterError, PrivacyError
from fedpeft.privacy.independence import row_engine
from fedpeft.resident import Resident
from fedpeft.tasks.heads import pack_rows
from fedpeft.tasks.losses import batch_losses
from fedpeft.tasks.packing import packed, sequences
from fedpeft.training.batched.together import why_not
from fedpeft.training.prefix import UnfitError, prefix_of
from tests.tasks.test_heads import FAMILIES, LORA, TASK, batch_of, gradients, model_of

NEAR = 1e-5  # some families take the softmax of attention in float32, also where all else is in float64


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 20))
def test_every_row_is_in_one_sequence_and_none_is_too_long(lengths: list[int], length: int) -> None:
    found = sequences(lengths, length)
    assert sorted(row for group in found for row in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[row] for row in group) <= length for group in found)
    # any two sequences were one if they fitted, but for one row that is longer than allowed
    totals = [sum(lengths[row] for row in group) for group in found]
    assert all(one + other > length for i, one in enumerate(totals) for other in totals[:i] if other)


def test_tokens_lie_where_they_are_said_to_and_positions_begin_anew() -> None:
    batch = batch_of()  # of 7, 4 and 5 tokens
    together = packed(batch, 12)
    assert together.inputs["input_ids"].shape == (2, 12)
    assert together.inputs["position_ids"].tolist() == [[*range(7), *range(5)], [*range(4), *[0] * 8]]
    held = batch["attention_mask"].bool()
    back = together.unpacked(together.inputs["input_ids"][..., None])[..., 0]
    assert torch.equal(back[held], batch["input_ids"][held])


@pytest.mark.parametrize("length", [7, 11, 100])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "OPT"])
def test_packed_rows_have_the_losses_and_gradients_of_rows_alone(family: str, length: int) -> None:
    base = model_of(family)
    linear = [name for name, module in base.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    head = next(name for name, each in base.named_modules() if each is base.get_output_embeddings())  # type: ignore[operator]
    targets = [name for name in linear if name != head]
    model = get_peft_model(base, LoraConfig(target_modules=targets, **LORA))  # type: ignore[arg-type]
    batch = batch_of()
    alone, counts = batch_losses(TASK, model, batch)
    expected = gradients(alone, model)
    pack_rows(model, length)
    together, counted = batch_losses(TASK, model, batch)
    assert torch.equal(counts, counted)
    assert torch.allclose(alone, together, rtol=0, atol=NEAR)
    found = gradients(together, model)
    assert all(torch.allclose(a, b, rtol=0, atol=NEAR) for a, b in zip(expected, found, strict=True))


def test_a_model_that_does_not_keep_rows_apart_is_refused_by_name() -> None:
    model = get_peft_model(model_of("Llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"data.packing = true: LlamaForCausalLM, with this adapter"):
        pack_rows(model.double(), 16)
    with pytest.raises(AdapterError, match=r"data.packing = true: OPTForCausalLM"):  # whose mask knows no positions
        pack_rows(model_of("OPT"), 16)


def test_what_needs_rows_by_themselves_refuses_packing(tiny_llama: Path, pairs_jsonl: Path, tiny_bert: Path) -> None:
    start: dict[str, Any] = {"model.name": str(tiny_llama), "data.source": str(pairs_jsonl), "adapter.layers": "last:1"}
    own = {"data.completion": "completion", "data.packing": True, "federation.clients": 2, "adapter.rank": 2}
    home = Resident(resolve([nest({**start, **own})]))
    assert "share a sequence" in why_not(home.adapted, home.own_layers, home.config.train)
    with pytest.raises(UnfitError, match=r"packed rows \(data.packing\)"):
        prefix_of(home.adapted.model, "fp32")
    with pytest.raises(PrivacyError, match=r"privacy.level = 'record' .* data.packing = true"):
        row_engine(home)
    other = {"model.name": str(tiny_bert), "model.task": "sequence-classification", "data.packing": True}
    with pytest.raises(AdapterError, match=r"data.packing = true is for causal language models"):
        _ = Resident(resolve([nest({**other, "data.labels": "a,b"})])).adapted
