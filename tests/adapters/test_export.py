"""What is written loads again: by plain PEFT, for models of many makes, and to the same numbers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.export import read_adapter, write_adapter
from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import AdapterError
from fedpeft.models import BaseModel, base_folder, load_base
from fedpeft.rescoring import rescore
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies.algebra.base_changes import advance, as_step, exact_sum

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CAUSAL: dict[str, Any] = SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = CAUSAL | {"num_key_value_heads": 1}
TEXT, CHAT, IMAGE = "sequence-classification", "causal-lm", "image-classification"
MAKES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": (TEXT, lambda: tf.BertModel(tf.BertConfig(**SMALL))),
    "roberta": (TEXT, lambda: tf.RobertaModel(tf.RobertaConfig(**SMALL))),
    "distilbert": (
        TEXT,
        lambda: tf.DistilBertModel(tf.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24)),
    ),
    "albert": (TEXT, lambda: tf.AlbertModel(tf.AlbertConfig(embedding_size=8, **SMALL))),
    "deberta-v2": (
        TEXT,
        lambda: tf.DebertaV2Model(tf.DebertaV2Config(relative_attention=True, pos_att_type=["c2p", "p2c"], **SMALL)),
    ),
    "modernbert": (TEXT, lambda: tf.ModernBertModel(tf.ModernBertConfig(**CAUSAL, cls_token_id=1, sep_token_id=2))),
    "gpt2": (
        CHAT,
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
    ),
    "llama": (CHAT, lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED))),
    "qwen2": (CHAT, lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED))),
    "gemma": (CHAT, lambda: tf.GemmaForCausalLM(tf.GemmaConfig(head_dim=8, **GROUPED))),
    "phi": (CHAT, lambda: tf.PhiForCausalLM(tf.PhiConfig(**CAUSAL))),
    "mixtral": (CHAT, lambda: tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=4, **GROUPED))),
    "qwen2-moe": (
        CHAT,
        lambda: tf.Qwen2MoeForCausalLM(
            tf.Qwen2MoeConfig(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8, **GROUPED)
        ),
    ),
    "opt": (
        CHAT,
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, **CAUSAL)
        ),
    ),
    "bloom": (CHAT, lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))),
    "gpt-neox": (CHAT, lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**CAUSAL))),
    "vit": (IMAGE, lambda: tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **IMAGES))),
    "swin": (
        IMAGE,
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(image_size=8, patch_size=2, embed_dim=16, depths=[1], num_heads=[2], window_size=2)
        ),
    ),
}
IMAGES = {name: value for name, value in SMALL.items() if name != "vocab_size"}
LABELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[BaseModel, str]]:
    """Return a model by its make, saved and loaded once as a run loads it; and the task."""
    loaded: dict[str, BaseModel] = {}

    def get(make: str) -> tuple[BaseModel, str]:
        task, build = MAKES[make]
        if make not in loaded:
            folder = tmp_path_factory.mktemp(make)
            torch.manual_seed(0)
            build().save_pretrained(folder)
            config = settings(folder, task)
            loaded[make] = load_base(config, base_folder(config.model), () if task == CHAT else LABELS)
        return copy.deepcopy(loaded[make]), task

    return get


def settings(folder: Path, task: str, **own: object) -> RunConfig:
    named = {name.replace("__", "."): value for name, value in own.items()}
    return resolve([nest({"model.name": str(folder), "model.task": task, "adapter.rank": 2, **named})])


def logits(model: Any, task: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    if task == IMAGE:
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=draw)}
    else:
        ids = torch.randint(3, 40, (2, 6), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def by_peft(base: BaseModel, folder: Path) -> Any:
    """Load as a user does, into a model whose head is somebody else's."""
    for name in base.head:
        for parameter in base.model.get_submodule(name).parameters():
            torch.nn.init.normal_(parameter)
    return PeftModel.from_pretrained(base.model, str(folder))  # type: ignore[arg-type]


def moved(live: AdaptedModel) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=draw) if name in live.trained else tensor
        for name, tensor in live.initial.items()
    }


def check_export(base_of: Any, make: str, folder: Path, **own: object) -> None:
    base, task = base_of(make)
    plain = copy.deepcopy(base)
    before = logits(plain.model, task)
    live = AdaptedModel(base, settings(base.folder, task, **own))
    state = AdapterState.from_tensors(moved(live), live.scaling)
    if state.factors and all(
        f.R is None for f in state.factors.values()
    ):  # as flora and its kin leave it: ranks differ
        draw = torch.Generator().manual_seed(3)
        steps = {
            layer: as_step(
                0.2 * torch.randn(f.B.shape[0], 1 + number % 2, generator=draw),
                0.2 * torch.randn(1 + number % 2, f.A.shape[1], generator=draw),
                like=f.A,
            )
            for number, (layer, f) in enumerate(state.factors.items())
        }
        state = AdapterState(state.factors, state.dense, advance({}, steps))
    live.load(state.to_tensors(), live.scaling)
    live.save(folder, exact_sum(state), () if task == CHAT else LABELS)
    expected, found = logits(live.model, task), logits(by_peft(plain, folder), task)
    assert float((expected - before).abs().max()) > 1e-3  # or nothing would have been tested
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKES)
def test_every_linear_layer_of_every_make_comes_back(make: str, base_of: Any, tmp_path: Path) -> None:
    # one layer of this MoE has a single output, which no rank of 2 fits
    targets = ["q_proj", "v_proj", "shared_expert.down_proj"] if make == "qwen2-moe" else ["all-linear"]
    check_export(base_of, make, tmp_path, adapter__targets=targets)


@pytest.mark.parametrize(
    "own",
    [
        {"adapter__kind": "ffa-lora"},
        {"adapter__kind": "rslora"},
        {"adapter__kind": "dora"},
        {"adapter__kind": "adalora"},
        {"adapter__kind": "vera"},
        {"adapter__kind": "randlora"},
        {"adapter__kind": "miss"},
        {"adapter__kind": "loha"},
        {"adapter__kind": "lokr"},
        {"adapter__init": "pissa"},
        {"adapter__init": "olora"},
        {"adapter__init": "gaussian"},
    ],
    ids=lambda own: "-".join(map(str, own.values())),
)
@pytest.mark.parametrize("make", ["bert", "llama"])
def test_every_kind_comes_back(make: str, own: dict[str, object], base_of: Any, tmp_path: Path) -> None:
    check_export(base_of, make, tmp_path, **own)


def test_a_run_of_a_mixture_of_experts_is_scored_again(pairs_jsonl: Path, tmp_path: Path, tiny_llama: Path) -> None:
    """PEFT keeps sets in the settings of such an adapter, even where no expert is adapted."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(num_local_experts=4, **GROUPED | {"vocab_size": 63})
    tf.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, tmp_path / "base")
    own = {"data.source": str(pairs_jsonl), "federation.rounds": 1, "train.local_steps": 1, "simulation.workers": 0}
    run = simulate(settings(tmp_path / "base", CHAT, **own, federation__clients=2), tmp_path / "run").path
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert saved["target_parameters"] == []
    reported = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [event for event in reported if event["event"] == "evaluate"][-1]
    assert rescore(run, {})["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_layers_whose_names_end_alike_keep_their_own_ranks(tmp_path: Path) -> None:
    """PEFT's patterns are expressions that match the end of a name."""
    layers = ("layers.0.q", "extra.layers.0.q", "layersX0.q")
    factors = {
        f"base_model.model.{layer}": LoraFactors(torch.ones(rank, 4), torch.ones(5, rank), 0.5 * rank)
        for rank, layer in enumerate(layers, start=1)
    }
    write_adapter(tmp_path, {"peft_type": "LORA", "target_modules": list(layers)}, AdapterState(factors))
    again = read_adapter(tmp_path).state.factors
    assert {layer: (f.rank, f.scaling) for layer, f in again.items()} == {
        layer: (f.rank, f.scaling) for layer, f in factors.items()
    }


def test_what_has_no_form_in_json_is_an_error_with_its_key_and_writes_nothing(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "outer": {"inner": [1, object()]}}
    with pytest.raises(TypeError, match=r"'outer\.inner\[1\]' is of type object"):
        write_adapter(tmp_path / "out", settings, AdapterState({}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [0, float("nan"), float("inf")])
def test_a_scaling_that_is_no_number_is_refused(alpha: float, tmp_path: Path) -> None:
    factors = {"base_model.model.q": LoraFactors(torch.ones(2, 3), torch.ones(3, 2), 1.0)}
    write_adapter(tmp_path, {"peft_type": "LORA", "target_modules": ["q"]}, AdapterState(factors, {}))
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": alpha}))
    with pytest.raises(AdapterError, match="must be a number other than 0"):
        read_adapter(tmp_path)
