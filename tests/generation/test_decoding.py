"""Greedy generation in batches against a model that is asked for one token after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from fedpeft.generation import Limits, generate, shortened
from fedpeft.generation.decoding import batches
from tests.adapters.test_families import LANGUAGE

KINDS: dict[str, Any] = {
    "plain": None,
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    "prompt-tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix-tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}
NEW = 8


@pytest.fixture(scope="module")
def tokenizer(table_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(table_llama)


def made(folder: Path, kind: str = "plain") -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False  # as a run loads its base
    torch.manual_seed(3)
    return (model if kind == "plain" else peft.get_peft_model(model, KINDS[kind]())).eval()


def prompts() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 63, (length,), generator=draw) for length in (0, 1, 5, 30, 7, 200, 12)]


@torch.no_grad()
def one_by_one(model: nn.Module, tokenizer: Any, prompt: Tensor, most: int) -> str:
    ids, said = prompt[-most:].tolist() or [tokenizer.eos_token_id], list[int]()
    for _ in range(NEW):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        said.append(token)
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_answered_token_by_token_as_each_prompt_alone(table_llama: Path, tokenizer: Any, kind: str) -> None:
    model = made(table_llama, kind)
    most = 128 - NEW - (0 if kind in ("plain", "lora") else 3)  # virtual tokens take places, too
    expected = [one_by_one(model, tokenizer, prompt, most) for prompt in prompts()]
    assert len(set(expected)) > 4
    assert generate(model, tokenizer, prompts(), Limits(NEW)) == expected


# where windows of attention are short, whatever parts virtual tokens from their prompt is seen
CASES = [("mistral", kind) for kind in KINDS] + [("gemma2", "prefix-tuning")]
CASES += [(family, "plain") for family in LANGUAGE]


@pytest.mark.parametrize(("family", "kind"), dict.fromkeys(CASES))
def test_every_family_answers_a_batch_as_each_prompt_alone(tokenizer: Any, family: str, kind: str) -> None:
    name, fields, _ = LANGUAGE[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**fields, "vocab_size": 63, "output_router_logits": False})
    base = transformers.AutoModelForCausalLM.from_config(config)
    model = (base if kind == "plain" else peft.get_peft_model(base, KINDS[kind]())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)  # else all prompts are answered alike
    short = [prompt for prompt in prompts() if len(prompt) < 80]
    expected = [one_by_one(model, tokenizer, prompt, 80) for prompt in short]
    assert len(set(expected)) > 3
    assert generate(model, tokenizer, short, Limits(NEW)) == expected


def test_an_answer_depends_neither_on_the_batch_nor_on_the_order(table_llama: Path, tokenizer: Any) -> None:
    model, asked = made(table_llama, "lora"), prompts()
    together = generate(model, tokenizer, asked, Limits(NEW))
    assert generate(model, tokenizer, asked, Limits(NEW, batch_rows=2)) == together
    assert generate(model, tokenizer, asked[::-1], Limits(NEW, batch_tokens=30)) == together[::-1]


def test_what_the_folder_says_of_sampling_is_ignored_and_left_as_it_was(table_llama: Path, tokenizer: Any) -> None:
    model = made(table_llama)
    assert model.generation_config.do_sample
    assert generate(model, tokenizer, prompts(), Limits(NEW)) == generate(model, tokenizer, prompts(), Limits(NEW))
    assert model.generation_config.repetition_penalty == 3.0
    assert model.generation_config.temperature == 5.0


def test_bf16_answers_as_autocast_computes(table_llama: Path, tokenizer: Any) -> None:
    model = made(table_llama, "lora").bfloat16()
    assert all(generate(model, tokenizer, prompts()[1:3], Limits(2), "bf16"))


def test_the_base_answers_where_the_adapter_is_off(table_llama: Path, tokenizer: Any) -> None:
    short = [prompt for prompt in prompts() if len(prompt) < 100]
    plain = generate(made(table_llama), tokenizer, short, Limits(NEW))
    for kind in ("lora", "prefix-tuning"):
        model = made(table_llama, kind)
        assert generate(model, tokenizer, short, Limits(NEW)) != plain
        with model.disable_adapter():
            assert generate(model, tokenizer, short, Limits(NEW)) == plain


def test_a_prompt_that_the_model_cannot_read_loses_its_beginning_and_is_counted(table_llama: Path) -> None:
    assert shortened(made(table_llama), prompts(), Limits(NEW)) == 1
    assert shortened(made(table_llama), prompts(), Limits(256)) == 1  # an answer takes half at most
    assert Limits(256, max_length=128).new_tokens == 64
    assert Limits(256, max_length=128).prompt_tokens == 64
    assert Limits(256).prompt_tokens is None


def test_batches_hold_each_row_once_within_the_budget_and_the_longest_first() -> None:
    lengths = [5, 100, 7, 30, 30, 1]
    found = list(batches(lengths, Limits(10, batch_tokens=80, batch_rows=3)))
    assert found[0] == [1]  # longer than the budget: alone
    assert sorted(row for batch in found for row in batch) == list(range(6))
    assert all(len(batch) * (lengths[batch[0]] + 10) <= 80 for batch in found[1:])
    assert list(batches([], Limits(10))) == []
    even = list(batches(lengths, Limits(10, batch_rows=3), even=True))
    assert even == [[1], [3, 4], [2], [0], [5]]
