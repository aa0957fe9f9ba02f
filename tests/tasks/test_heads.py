"""Trunk and head apart, against the whole model: losses and gradients, in every family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from fedpeft.models import torch_seed
from fedpeft.tasks import TASKS, heads
from fedpeft.tasks.losses import batch_losses, logits_of, next_token_losses
from fedpeft.training.neftune import EmbeddingNoise

TASK = TASKS.find("causal-lm")
SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Mistral": {},
    "Mixtral": {**MOE, "output_router_logits": True},
    "Qwen2Moe": {**MOE, "shared_expert_intermediate_size": 8},
    "Phi": {"num_key_value_heads": 2},
    "Phi3": {},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 8},
}
LORA = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False}


def model_of(family: str) -> nn.Module:
    names = {"Gemma3": "Gemma3TextConfig"}
    kind = getattr(transformers, names.get(family, f"{family}Config"))
    settings = {name: value for name, value in SMALL.items() if not (family == "GPT2" and name.startswith("num_"))}
    torch.manual_seed(0)
    experts = (
        {"experts_implementation": "eager"} if "num_experts" in FAMILIES[family] else {}
    )  # the only one in float64
    made: nn.Module = transformers.AutoModelForCausalLM.from_config(
        kind(**{**settings, "bos_token_id": 1, "eos_token_id": 2, **FAMILIES[family]}), **experts
    )
    return made.double().eval()


def batch_of(rows: int = 3, width: int = 7) -> dict[str, Tensor]:
    """Rows of different lengths, of which some tokens in the middle do not count either; the last row counts none."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 53, (rows, width), generator=draw)
    mask = (torch.arange(width) < torch.tensor([width, 4, 5])[:rows, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    labels[2] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def whole_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return next_token_losses(logits_of(model, batch), batch["labels"])


def gradients(losses: Tensor, model: nn.Module) -> list[Tensor]:
    weights = torch.linspace(0.3, 1.7, len(losses), dtype=torch.float64)  # no two rows alike
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((losses * weights).sum(), trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def check_same(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    whole, counts = whole_losses(model, batch)
    expected = gradients(whole, model)
    apart, counted = batch_losses(TASK, model, batch)
    assert vars(model)[heads.KEPT] is not None, "the model ran whole"
    assert torch.equal(counts, counted)
    assert torch.allclose(whole, apart, rtol=0, atol=1e-12)
    found = gradients(apart, model)
    assert any(bool(each.any()) for each in found)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(expected, found, strict=True))
    with torch.no_grad():
        assert torch.allclose(batch_losses(TASK, model, batch)[0], whole, rtol=0, atol=1e-12)


@pytest.fixture(autouse=True)
def blocks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "BLOCK_BYTES", 3 * 4 * 53)


@pytest.mark.parametrize("head", ["frozen head", "adapted head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_whole_model(family: str, head: str) -> None:
    base = model_of(family)
    linear = [name for name, module in base.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    head_name = next(name for name, each in base.named_modules() if each is base.get_output_embeddings())  # type: ignore[operator]
    targets = [name for name in linear if name != head_name or head == "adapted head"]
    check_same(get_peft_model(base, LoraConfig(target_modules=targets, **LORA)), batch_of())  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [PromptTuningConfig, PrefixTuningConfig])
def test_an_adapters_own_tokens_in_front_do_not_count(settings: Any) -> None:
    model = get_peft_model(model_of("Llama"), settings(num_virtual_tokens=3, task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    check_same(model.double(), batch_of())


def test_a_trained_embedding_that_is_the_head_too_has_both_gradients() -> None:
    model = model_of("Gemma2")
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)  # type: ignore[union-attr]
    check_same(model, batch_of())


def test_a_model_that_runs_whole_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = LoraConfig(target_modules=["q_proj"], **LORA)
    assert heads.runs_whole(get_peft_model(model_of("Llama"), frozen), by_hooks=True) == ""  # type: ignore[arg-type]
    adapted = get_peft_model(model_of("Llama"), LoraConfig(target_modules=["q_proj", "lm_head"], **LORA))  # type: ignore[arg-type]
    assert heads.runs_whole(adapted, by_hooks=False) == ""
    assert "to see each row whole" in heads.runs_whole(adapted, by_hooks=True)
    monkeypatch.setattr(heads, "_gives", lambda *_: False)
    whole = get_peft_model(model_of("Llama"), frozen)  # type: ignore[arg-type]
    assert "LlamaForCausalLM, with this adapter, cannot be run in two parts" in heads.runs_whole(whole, by_hooks=False)


def test_a_model_that_is_first_looked_at_under_noise_is_divided_all_the_same(tiny_llama: Path) -> None:
    """A worker's first batch is one that it trains on, and its noise draws others for the look."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).train()
    inputs = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with torch_seed(3), EmbeddingNoise(model, 5.0).of(inputs):
        assert heads.divided(model, inputs) is not None
        assert model.training
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
