from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import AdapterError
from fedpeft.models import base_folder, load_base, torch_seed
from fedpeft.tasks.losses import mean_loss
from fedpeft.training import prefix
from fedpeft.training.local import training_mode
from fedpeft.training.prefix import Prefix, UnfitError, feeding, prefix_of

SMALL: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TEXT: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, **SMALL}
HEADS: dict[str, Any] = {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 2}
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4, **SMALL}
TOKENS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 2}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODERN: dict[str, Any] = {**TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}
GPT2: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
T5: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
BOTH: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT, **STILL)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**TEXT, **STILL)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=24, dropout=0.0, attention_dropout=0.0
        )
    ),
    "modernbert": lambda: transformers.ModernBertModel(transformers.ModernBertConfig(**TEXT, **MODERN)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2, **TOKENS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **HEADS)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, **HEADS)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**TEXT, **HEADS, head_dim=8)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, **STILL)),
    "clip": lambda: transformers.CLIPForImageClassification(
        transformers.CLIPConfig(vision_config=IMAGE, text_config={**TEXT, **TOKENS})
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **BOTH, dropout_rate=0.0)),
}
CASES = [
    *((name, "sequence-classification") for name in ("bert", "roberta", "distilbert", "modernbert", "gpt2", "llama")),
    *((name, "causal-lm") for name in ("gpt2", "llama", "qwen2", "gemma")),
    *((name, "image-classification") for name in ("vit", "clip")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def saved(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            MODELS[name]().save_pretrained(made[name])
        return made[name]

    return saved


def adapted(folder: Path, task: str = "sequence-classification", **settings: object) -> tuple[AdaptedModel, RunConfig]:
    own = {name.replace("__", "."): value for name, value in settings.items()}
    start = {"model.name": str(folder), "model.task": task, "adapter.rank": 2, "adapter.layers": "last:1"}
    config = resolve([nest({**start, "simulation.prefix_cache": "on"}), nest(own)])
    labels = () if task == "causal-lm" else ("a", "b", "c")
    model = AdaptedModel(load_base(config, base_folder(config.model), labels), config)
    torch.manual_seed(1)
    model.load({name: t + 0.1 * torch.randn_like(t) for name, t in model.initial.items()}, model.scaling)
    return model, config


def rows(task: str = "sequence-classification", pad: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(2)
    if task.startswith("image"):
        return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    mask = (torch.arange(9) < torch.tensor([9, 3, 1, 6])[:, None]).long()
    ids = torch.randint(3, 40, (4, 9)).masked_fill(mask == 0, pad)
    labels = ids.masked_fill(mask == 0, -100) if task == "causal-lm" else torch.tensor([0, 1, 2, 0])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_fed_model_has_the_gradients_of_one_that_runs_all_its_blocks(
    folders: Callable[[str], Path], name: str, task: str, precision: str
) -> None:
    model, config = adapted(folders(name), task, train__precision=precision)
    batch = rows(task)
    found = []
    for on in (False, True, True):
        training_mode(model.model)
        parameters = model.begin_training(model.trained)
        model.model.zero_grad()
        settings = config if on else config.model_copy(update={"simulation": RunConfig().simulation})
        with feeding(model.model, settings), torch_seed(3):  # of dropout above, such as DistilBERT's before its head
            mean_loss(model.task, model.model, batch, precision).backward()  # type: ignore[no-untyped-call]
        found.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
    plain, cold, warm = found
    assert plain
    assert all(torch.equal(one, other) for one, other in zip(cold, warm, strict=True))
    close = 1e-4 if precision == "fp32" else 0.1
    largest = max(float(each.abs().max()) for each in plain)
    for one, other in zip(plain, cold, strict=True):
        assert float((one - other).abs().max()) <= close * largest


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("t5", {}, "hands more from block to block"),
        ("bert", {"adapter.kind": "ln_tuning"}, "is adapted before its blocks too"),
    ],
)
def test_a_model_that_would_compute_something_else_is_told(
    folders: Callable[[str], Path], name: str, settings: dict[str, object], why: str
) -> None:
    model, _ = adapted(folders(name), **settings)
    assert why in Prefix(model.model, "fp32").problem(rows())


@pytest.mark.parametrize("place", ["embeddings.dropout", "encoder.layer.1.output.dropout"])
def test_dropout_is_a_reason_below_the_adapter_alone(folders: Callable[[str], Path], place: str) -> None:
    model, _ = adapted(folders("bert"))
    inner: Any = model.model.get_base_model()
    inner.bert.encoder.layer[2].output.dropout.p = 0.1
    assert Prefix(model.model, "fp32").problem(rows()) == ""
    inner.bert.get_submodule(place).p = 0.1
    assert "draws dropout below" in Prefix(model.model, "fp32").problem(rows())


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"adapter.layers": "first:1"}, "is adapted in its first block"),
        ({"adapter.kind": "prompt-tuning", "adapter.layers": None, "data.max_length": 20}, "is given virtual tokens"),
    ],
)
def test_a_model_with_nothing_below_its_adapter_is_told(
    folders: Callable[[str], Path], settings: dict[str, object], why: str
) -> None:
    model, config = adapted(folders("bert"), **settings)
    with pytest.raises(UnfitError, match=why):
        prefix_of(model.model, "fp32")
    with pytest.raises(AdapterError, match=f"prefix_cache = 'on': the model {why}"), feeding(model.model, config):
        pass


def test_blocks_that_give_what_depends_on_company_are_found_out(folders: Callable[[str], Path]) -> None:
    model, config = adapted(folders("bert"))
    block = prefix_of(model.model, "fp32").blocks[0]
    block.register_forward_hook(lambda module, given, output: output - output.mean(0))
    assert "computes something else" in Prefix(model.model, "fp32").problem(rows())
    with (
        pytest.raises(AdapterError, match=r"computes something else.*prefix_cache=off"),
        feeding(model.model, config),
        torch.no_grad(),
    ):
        mean_loss(model.task, model.model, rows())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_states_of_a_row_are_the_same_bytes_in_any_company(folders: Callable[[str], Path], name: str) -> None:
    model, _ = adapted(folders(name))
    inputs = {key: value for key, value in rows().items() if key != "labels"}
    together = Prefix(model.model, "fp32").hidden(inputs)
    for row, length in enumerate([9, 3, 1, 6]):
        prefix = Prefix(model.model, "fp32")
        alone = prefix.hidden({key: value[row : row + 1] for key, value in inputs.items()})
        assert torch.equal(alone[0], together[row])
        assert not together[row, length:].any()


def test_only_blocks_above_run_and_afterwards_all_do(folders: Callable[[str], Path]) -> None:
    model, config = adapted(folders("bert"))
    ran: list[int] = []
    layers: Any = model.model.get_base_model()
    for number, block in enumerate(layers.bert.encoder.layer):
        block.attention.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        with feeding(model.model, config):
            for _ in range(2):
                ran.clear()
                mean_loss(model.task, model.model, rows())
            assert ran == [2]
        with pytest.raises(KeyError), feeding(model.model, config):
            raise KeyError
        ran.clear()
        mean_loss(model.task, model.model, rows())
    assert ran == [0, 1, 2]


def test_states_are_known_by_what_lies_below_and_not_by_what_is_trained(folders: Callable[[str], Path]) -> None:
    model, _ = adapted(folders("bert"))
    again, _ = adapted(folders("bert"), adapter__kind="ffa-lora", adapter__rank=3, adapter__targets="all-linear")
    deeper, _ = adapted(folders("bert"), adapter__layers="last:2")
    known = Prefix(model.model, "fp32").fingerprint()
    assert Prefix(again.model, "fp32").fingerprint() == known
    assert len({known, Prefix(deeper.model, "fp32").fingerprint(), Prefix(model.model, "bf16").fingerprint()}) == 3
    inner: Any = model.model.get_base_model()
    inner.bert.encoder.layer[2].output.dense.weight.data += 1
    assert Prefix(model.model, "fp32").fingerprint() == known
    inner.bert.encoder.layer[1].output.dense.weight.data[0, 0] += 1
    assert Prefix(model.model, "fp32").fingerprint() != known


def test_the_code_of_a_base_and_what_rounds_its_products_count_as_much_as_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "beside.py").write_text("SCALE = 1")
    (tmp_path / "own_base.py").write_text("from torch import nn\nclass Own(nn.Linear):\n    pass\n")
    own = importlib.import_module("own_base").Own(2, 2)
    before = prefix._sources(own)
    assert len(before) == 2
    assert prefix._sources(torch.nn.Linear(2, 2)) == []
    (tmp_path / "beside.py").write_text("SCALE = 2")
    assert prefix._sources(own) != before
    plain = prefix._arithmetic()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert prefix._arithmetic() != plain
