"""What `adapter.targets` may say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.beyond import part_shared
from fedpeft.adapters.state import AdapterState
from fedpeft.config import from_flat, nest, resolve
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.models import load_base

PATTERN = r"re:.*\.[01]\.self_attn\.(q|v){1,1}_proj"


def adapted(folder: Path, targets: str) -> AdaptedModel:
    words = {"model.name": str(folder), "model.task": "causal-lm", "adapter.rank": 2, "adapter.targets": targets}
    config = resolve([nest(words)])
    return AdaptedModel(load_base(config, folder, ()), config)


def test_an_expression_keeps_its_commas_on_the_wire_and_on_disk() -> None:
    config = resolve([nest({"adapter.targets": PATTERN})])
    assert config.adapter.targets == (PATTERN,)
    assert from_flat(config.to_flat()).adapter.targets == (PATTERN,)
    assert resolve([nest({"adapter.targets": [PATTERN]})]).adapter.targets == (PATTERN,)


def test_an_expression_matches_whole_names_as_pefts_does(tiny_llama: Path) -> None:
    live = adapted(tiny_llama, PATTERN)
    every = [name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_llama).named_modules()]
    assert sorted(live.layers) == sorted(name for name in every if re.fullmatch(PATTERN.removeprefix("re:"), name))
    assert len(live.layers) == 4


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("re:(q_proj", "is no regular expression"),
        ("q_proj,re:.*v_proj", "must stand alone"),
        ("re:q_proj", "matches no linear module"),
        ("re:.*embed_tokens", "an expression reaches linear layers alone, so name it"),
    ],
)
def test_what_cannot_be_adapted_is_named(targets: str, says: str, tiny_llama: Path) -> None:
    with pytest.raises((AdapterError, ConfigError), match=says):
        adapted(tiny_llama, targets)


def test_an_adapted_output_layer_computes_in_peft_as_here(tiny_llama: Path, tmp_path: Path) -> None:
    live = adapted(tiny_llama, "lm_head,q_proj")
    assert "lm_head" in live.layers
    moved = {name: tensor + 0.1 for name, tensor in live.initial.items()}
    live.load(moved, live.scaling)
    live.save(tmp_path, AdapterState.from_tensors(moved, live.scaling), ())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path))
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(live.model(input_ids=tokens).logits, loaded(input_ids=tokens).logits)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, pad_token_id=0, **shape)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens", "re:.*", "embed_tokens,lm_head,q_proj"])
def test_embeddings_and_output_layer_of_one_weight_are_adapted_and_merged_apart(
    targets: str, tied: Path, tmp_path: Path
) -> None:
    live = adapted(tied, targets)
    assert "PEFT's merge_and_unload would change both" in live.notes[-1]
    moved = {name: tensor + 0.1 for name, tensor in live.initial.items()}
    live.load(moved, live.scaling)
    live.save(tmp_path, AdapterState.from_tensors(moved, live.scaling), ())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), str(tmp_path))
    part_shared(loaded)
    merged = loaded.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        here = live.model(input_ids=tokens).logits
        assert torch.allclose(here, again(input_ids=tokens).logits, atol=1e-5)
    with pytest.raises(AdapterError, match="is at once the embeddings' and the output"):
        live.check_movable("strategy.name = 'flora'")
