"""Every family of models: two clients train one round, and PEFT alone reads what they have made."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy

from fedpeft.config import nest, resolve
from fedpeft.runs import read_events
from fedpeft.simulations.simulate import simulate
from tests.conftest import WORDS

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
ENDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**SHAPE, **ENDS, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts_per_tok": 2}
# configuration, its fields, and a name that is adapted where no targets are given
LANGUAGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", GROUPED, "q_proj"),
    "qwen2": ("Qwen2Config", GROUPED, "q_proj"),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}, "q_proj"),
    "gemma2": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": 3.0}, "q_proj"),
    "gemma3": ("Gemma3TextConfig", GEMMA, "q_proj"),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}, "q_proj"),
    "mixtral": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4, "output_router_logits": True}, "q_proj"),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "q_proj",
    ),
    "phi": ("PhiConfig", {**GROUPED, "partial_rotary_factor": 0.5}, "q_proj"),
    "phi3": ("Phi3Config", GROUPED, "qkv_proj"),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, **ENDS},
        "c_attn",
    ),
    "gpt-neox": ("GPTNeoXConfig", {**SHAPE, **ENDS}, "query_key_value"),
    "opt": (
        "OPTConfig",
        {
            **{name: value for name, value in (SHAPE | ENDS).items() if name != "intermediate_size"},
            "ffn_dim": 48,
            "word_embed_proj_dim": 16,
        },
        "q_proj",
    ),
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1}
ENCODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", SHAPE, "query"),
    "roberta": ("RobertaConfig", {**SHAPE, **ENDS}, "query"),
    "xlm-roberta": ("XLMRobertaConfig", {**SHAPE, **ENDS}, "query"),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 259, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 96},
        "q_lin",
    ),
    "deberta-v2": ("DebertaV2Config", {**SHAPE, **DEBERTA}, "query_proj"),
    "modernbert": ("ModernBertConfig", {**SHAPE, **ENDS, "cls_token_id": 2, "sep_token_id": 2}, "Wqkv"),
    "electra": ("ElectraConfig", {**SHAPE, "embedding_size": 16}, "query"),
    "albert": ("AlbertConfig", {**SHAPE, "embedding_size": 16}, "query"),
}


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes, which every family's own class can read."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    ).save_pretrained(folder)


class Rows(NamedTuple):
    """Rows of two clients, the rows that are scored, and what reads them."""

    folder: Path
    pairs: list[dict[str, str]]
    texts: list[dict[str, str]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("rows")
    write_tokenizer(folder / "tokenizer")
    draw = random.Random(0)
    pairs, texts = [], []
    for index in range(24):
        words, client = draw.choices(WORDS, k=draw.randint(6, 12)), f"site-{index % 2}"
        pairs.append({"prompt": " ".join(words[:4]), "completion": " ".join(words[4:]), "client": client})
        texts.append({"text": " ".join(words), "label": "yes" if index % 3 else "no", "client": client})
    for name, listed in (("pairs", pairs), ("texts", texts)):
        for part, some in (("train", listed[:16]), ("test", listed[16:])):
            (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return Rows(folder, pairs[16:], texts[16:])


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base_of(family: tuple[str, dict[str, Any], str], auto: Any, rows: Rows, folder: Path) -> Path:
    torch.manual_seed(0)
    auto.from_config(getattr(transformers, family[0])(**family[1])).save_pretrained(folder)
    shutil.copytree(rows.folder / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def trained(base: Path, rows: Rows, out: Path, name: str, settings: dict[str, object]) -> tuple[Path, float]:
    """Return the adapter's folder and the loss on the test rows that the run reports."""
    config = resolve(
        [
            nest(
                {
                    "model.name": str(base),
                    "data.source": str(rows.folder / f"{name}-train.jsonl"),
                    "data.test": str(rows.folder / f"{name}-test.jsonl"),
                    "data.max_length": 64,
                    "partition.by": "client",
                    "strategy.name": "fedit",
                    "adapter.rank": 2,
                    "train.local_steps": 2,
                    "train.batch_size": 4,
                    "train.learning_rate": 0.02,
                    "federation.rounds": 1,
                    "simulation.workers": 0,
                    **settings,
                }
            )
        ]
    )
    run = simulate(config, out).path
    scores = [event for event in read_events(run) if event["event"] == "evaluate" and event["round"] == 1]
    return run / "adapter", float(scores[-1]["loss"])


def check(adapter: Path, base: Any, target: str) -> Any:
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert any(f".{target}." in name for name in moved)
    assert not any("lm_head" in name or "embed_out" in name for name in tensors)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


BESIDE = [  # experts, and embeddings: scaled ones, and such as share their weight with the output layer
    ("mixtral", "all-linear,experts.gate_up_proj,experts.down_proj,embed_tokens"),
    ("qwen2-moe", "q_proj,experts.gate_up_proj,experts.down_proj"),
    ("gemma3", "q_proj,embed_tokens"),
    ("gpt2", "c_attn,wte"),
]


@pytest.mark.parametrize(
    ("family", "targets"), [*((family, each) for family in LANGUAGE for each in ("unset", "all-linear")), *BESIDE]
)
def test_a_language_models_adapter_scores_in_peft_as_in_the_run(
    family: str, targets: str, rows: Rows, one_thread: None, tmp_path: Path
) -> None:
    base = base_of(LANGUAGE[family], transformers.AutoModelForCausalLM, rows, tmp_path / "base")
    settings: dict[str, object] = {"data.completion": "completion", "data.prompt": "prompt"}
    if targets != "unset":
        settings["adapter.targets"] = targets
    adapter, loss = trained(base, rows, tmp_path / "run", "pairs", settings)
    model = check(adapter, transformers.AutoModelForCausalLM.from_pretrained(base), LANGUAGE[family][2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for row in rows.pairs:  # one by one, so that nothing is padded
        prompt, answer = tokenizer(row["prompt"] + "\n")["input_ids"], tokenizer(row["completion"])["input_ids"]
        tokens = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1]
        total += float(cross_entropy(logits.double(), tokens[0, len(prompt) :], reduction="sum"))
        count += len(logits)
    assert total / count == pytest.approx(loss, rel=2e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoders_adapter_and_head_score_in_peft_as_in_the_run(
    family: str, rows: Rows, one_thread: None, tmp_path: Path
) -> None:
    base = base_of(ENCODERS[family], transformers.AutoModel, rows, tmp_path / "base")
    adapter, loss = trained(base, rows, tmp_path / "run", "texts", {})
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = check(adapter, plain, ENCODERS[family][2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    labels = json.loads((adapter / "labels.json").read_text())
    losses = []
    for row in rows.texts:
        tokens = torch.tensor([tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        losses.append(float(cross_entropy(logits.double(), torch.tensor([labels.index(row["label"])]))))
    assert sum(losses) / len(losses) == pytest.approx(loss, rel=2e-5)
