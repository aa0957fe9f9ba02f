from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.stacks import blocks_of, chosen_blocks, within
from fedpeft.adapters.state import AdapterState
from fedpeft.config import RunConfig, configure, nest, resolve
from fedpeft.errors import AdapterError
from fedpeft.models import base_folder, load_base

Make = Callable[..., RunConfig]
SIX = [f"encoder.layer.{number}" for number in range(6)]
HALVES: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [("last:2", [4, 5]), ("first:3", [0, 1, 2]), ("5,0, 1", [0, 1, 5]), ("3", [3]), (" last : 6 ", [0, 1, 2, 3, 4, 5])],
)
def test_blocks_are_chosen_from_either_end_or_by_number(layers: str, numbers: list[int]) -> None:
    assert chosen_blocks(SIX, layers) == [SIX[number] for number in numbers]


@pytest.mark.parametrize("layers", ["last:0", "last:9", "first:7", "6", "-1", "words", "last", "last:two", "", "1,,2"])
def test_a_choice_that_cannot_be_names_the_value_and_the_number_of_blocks(layers: str) -> None:
    with pytest.raises(AdapterError) as refused:
        chosen_blocks(SIX, layers)
    said = str(refused.value)
    assert f"adapter.layers = '{layers}': this model has 6 blocks, encoder.layer.0 to encoder.layer.5." in said
    assert "\n" not in said


def test_a_model_without_blocks_cannot_choose_any() -> None:
    with pytest.raises(AdapterError, match=r"adapter.layers = 'last:1': this model has no stack"):
        within(nn.Sequential(nn.Linear(2, 3)), (), ["0"], "last:1")


def test_the_blocks_of_an_encoder_decoder_are_counted_through() -> None:
    blocks = list(blocks_of(transformers.BartModel(transformers.BartConfig(**HALVES))))
    assert blocks == [f"{half}.layers.{n}" for half, count in (("encoder", 3), ("decoder", 2)) for n in range(count)]


def test_the_longest_stack_counts_and_what_lies_in_a_block_does_not() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"inner": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(9))})

    model = nn.ModuleDict({"few": nn.ModuleList(block() for _ in range(2)), "many": nn.ModuleList([block()] * 3)})
    assert list(blocks_of(model)) == ["many.0", "many.1", "many.2"]
    assert list(blocks_of(model, head=["many"])) == ["few.0", "few.1"]


def test_lists_in_a_configuration_say_the_same_as_text() -> None:
    assert [resolve([nest({"adapter.layers": given})]).adapter.layers for given in ([0, 5], 3, "last:2")] == [
        "0,5",
        "3",
        "last:2",
    ]
    assert RunConfig().adapter.layers is None


@pytest.mark.parametrize("kind", ["lora", "dora", "ln_tuning", "ia3", "vera", "lora-xs"])
def test_every_kind_that_chooses_targets_keeps_to_the_blocks(kind: str, text_config: Make) -> None:
    config = text_config(adapter__kind=kind, adapter__layers="last:1", adapter__targets=None)
    adapted = AdaptedModel(load_base(config, base_folder(config.model), ("no", "yes")), config)
    assert any(".layer.1." in name for name in adapted.layers)
    assert not any(".layer.0." in name for name in adapted.layers)
    # what is in no block stays as it is without the choice
    assert any("embeddings" in name for name in adapted.layers) == (kind == "ln_tuning")


def test_layers_and_targets_are_both_kept_to(text_config: Make) -> None:
    config = text_config(adapter__layers="0", adapter__targets="key,intermediate.dense")
    adapted = AdaptedModel(load_base(config, base_folder(config.model), ("no", "yes")), config)
    assert adapted.layers == ("bert.encoder.layer.0.attention.self.key", "bert.encoder.layer.0.intermediate.dense")
    outside = text_config(adapter__layers="0", adapter__targets="layer.1.attention.self.key")
    with pytest.raises(AdapterError, match=r"'layer.1.attention.self.key' matches no .*, within adapter.layers"):
        AdaptedModel(load_base(outside, base_folder(outside.model), ("no", "yes")), outside)


def test_virtual_tokens_have_no_blocks_to_choose(text_config: Make) -> None:
    config = text_config(adapter__kind="prompt-tuning", adapter__layers="last:1", data__max_length=32)
    with pytest.raises(AdapterError, match=r"adapter.layers = 'last:1' leaves adapter.kind = 'prompt-tuning' nothing"):
        AdaptedModel(load_base(config, base_folder(config.model), ("no", "yes")), config)


@pytest.mark.parametrize("kind", ["lora", "ln_tuning", "ia3"])
def test_an_adapter_of_some_blocks_loads_in_peft_and_scores_the_same(
    kind: str, text_config: Make, tmp_path: Path
) -> None:
    config = text_config(adapter__kind=kind, adapter__layers="last:1")
    adapted = AdaptedModel(load_base(config, base_folder(config.model), ("no", "yes")), config)
    torch.manual_seed(0)
    moved = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in adapted.initial.items()}
    adapted.load(moved, adapted.scaling)
    adapted.save(tmp_path, AdapterState.from_tensors(moved, adapted.scaling), ("no", "yes"))
    base = load_base(config, base_folder(config.model), ("no", "yes"))
    loaded = PeftModel.from_pretrained(base.model, str(tmp_path)).eval()
    ids = torch.randint(3, 60, (4, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, adapted.model.eval()(input_ids=ids).logits)


def test_a_preset_takes_the_choice_too() -> None:
    assert configure({"adapter.layers": "last:2"}, preset="digits").adapter.layers == "last:2"
