from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import AdapterState, LoraFactors
from fedpeft.adapters.targets import choose_targets
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import AdapterError, ModelError
from fedpeft.models import base_folder, load_base
from fedpeft.strategies.algebra.base_changes import advance, as_step, exact_sum

Make = Callable[..., RunConfig]
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
BASES: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=40, **SMALL)),
    "bert-without-pooler": lambda: transformers.BertModel(
        transformers.BertConfig(vocab_size=40, **SMALL), add_pooling_layer=False
    ),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(vocab_size=40, **SMALL)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, pad_token_id=0, **SMALL)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **SMALL)
    ),
}
CASES = [
    ("bert", "sequence-classification"),
    ("bert-without-pooler", "sequence-classification"),
    ("roberta", "sequence-classification"),
    ("distilbert", "sequence-classification"),
    ("llama", "sequence-classification"),
    ("gpt2", "sequence-classification"),
    ("vit", "image-classification"),
    ("llama", "causal-lm"),
    ("gpt2", "causal-lm"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, make in BASES.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
    return folder


def adapted(folder: Path, task: str, **settings: object) -> tuple[AdaptedModel, RunConfig]:
    own = {name.replace("__", "."): value for name, value in settings.items()}
    config = resolve([nest({"model.name": str(folder), "model.task": task, "adapter.rank": 2, **own})])
    labels = () if task == "causal-lm" else ("a", "b", "c")
    return AdaptedModel(load_base(config, base_folder(config.model), labels), config), config


def logits(model: Any, task: str) -> torch.Tensor:
    torch.manual_seed(1)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if task.startswith("image") else None
    inputs = inputs or {"input_ids": torch.randint(1, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_what_is_saved_loads_with_peft_and_computes_the_same(name: str, task: str, bases: Path, tmp_path: Path) -> None:
    live, config = adapted(bases / name, task)
    moved = {key: tensor + 0.1 for key, tensor in live.initial.items()}
    live.load(moved, 1.5)
    live.save(tmp_path, AdapterState.from_tensors(moved, 1.5), ("a", "b", "c"))
    again, _ = adapted(bases / name, task, run__seed=9)  # another seed draws another head
    base = load_base(
        config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})}),
        bases / name,
        () if task == "causal-lm" else ("a", "b", "c"),
    )
    loaded = PeftModel.from_pretrained(base.model, str(tmp_path))
    assert torch.equal(logits(loaded, task), logits(live.model, task))
    assert not torch.equal(logits(again.model, task), logits(live.model, task))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 3.0


def test_an_adapter_of_another_rank_takes_the_place_of_the_first_and_back(bases: Path, tmp_path: Path) -> None:
    live, _ = adapted(bases / "bert", "sequence-classification")
    before = logits(live.model, "sequence-classification")
    torch.manual_seed(3)
    wider = {
        name: torch.randn(5, t.shape[1]) if "lora_A" in name else torch.randn(t.shape[0], 5) if "lora_B" in name else t
        for name, t in live.initial.items()
    }
    live.load(wider, 0.7)
    after = logits(live.model, "sequence-classification")
    assert not torch.equal(before, after)
    live.save(tmp_path, AdapterState.from_tensors(wider, 0.7), ("a", "b", "c"))
    fresh, config = adapted(bases / "bert", "sequence-classification")
    base = load_base(config, bases / "bert", ("a", "b", "c"))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base.model, str(tmp_path)), "seq"), after)
    live.load(live.initial, live.scaling)
    assert torch.equal(logits(live.model, "sequence-classification"), before)
    assert fresh.frozen_hash == ""


def test_the_seed_draws_the_same_adapter_in_any_process_and_another_seed_another(bases: Path) -> None:
    draws = [
        adapted(bases / "bert", "sequence-classification", adapter__kind="ffa-lora", run__seed=seed)[0].frozen_hash
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_targets_come_from_the_models_real_names(bases: Path) -> None:
    config = resolve([nest({"model.name": str(bases / "vit"), "model.task": "image-classification"})])
    base = load_base(config, bases / "vit", ("a", "b"))
    assert choose_targets(base, None, 2) == [
        "vit.layers.0.attention.q_proj",
        "vit.layers.0.attention.v_proj",
    ]
    assert len(choose_targets(base, ["all-linear"], 2)) == 6  # the head is not among them
    with pytest.raises(AdapterError, match=r"'query' matches no linear module.*Allowed: .*q_proj"):
        choose_targets(base, ["query"], 2)
    with pytest.raises(AdapterError, match=r"rank = 17 is larger than layer .* at most 16"):
        choose_targets(base, None, 17)


def test_a_base_for_another_task_is_refused_in_one_line(bases: Path) -> None:
    for name, task in (("bert", "causal-lm"), ("vit", "sequence-classification")):
        with pytest.raises(ModelError) as caught:
            adapted(bases / name, task)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "MetaClip2"])
def test_a_whole_trunk_is_no_head_though_no_child_is_named_as_the_trunk(name: str, tmp_path: Path) -> None:
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForImageClassification")(
        getattr(transformers, f"{name}Config")(vision_config=vision)
    )
    made.save_pretrained(tmp_path)
    live, _ = adapted(tmp_path, "image-classification")
    assert live.base.head == ("classifier",)
    assert [layer.rpartition(".")[2] for layer in live.layers] == ["v_proj", "q_proj"]
    live.save(tmp_path / "adapter", AdapterState.from_tensors(live.initial, 1.0), ("a", "b", "c"))
    base = load_base(
        resolve([nest({"model.name": str(tmp_path), "model.task": "image-classification"})]), tmp_path, "abc"
    )
    loaded = PeftModel.from_pretrained(base.model, str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded, "image"), logits(live.model, "image"))


def test_a_scoring_layer_inside_the_trunk_is_found(tmp_path: Path) -> None:
    config = transformers.PerceiverConfig(
        vocab_size=40, num_latents=4, d_latents=16, d_model=8, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.PerceiverForSequenceClassification(config).save_pretrained(tmp_path)
    live, _ = adapted(tmp_path, "sequence-classification")
    assert live.base.head == ("perceiver.decoder.decoder.final_layer",)


def test_a_model_without_linear_layers_is_named_and_nothing_in_vain_is_advised(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    for targets in (None, "all-linear", "q_proj"):
        with pytest.raises(AdapterError, match="has no linear layers outside its head") as caught:
            adapted(tmp_path, "image-classification", **({"adapter__targets": targets} if targets else {}))
        assert "all-linear" not in str(caught.value)


def test_all_linear_leaves_out_what_is_smaller_than_the_rank_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=40, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, pad_token_id=0, **SMALL,
    )  # fmt: skip
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    live, _ = adapted(tmp_path, "causal-lm", adapter__targets="all-linear")
    assert {layer.rpartition(".")[2] for layer in live.layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    small, experts = live.notes
    assert "1 layer smaller than adapter.rank = 2: shared_expert_gate" in small
    assert "2 tensors of all experts together (down_proj, gate_up_proj)" in experts
    with pytest.raises(AdapterError, match=r"rank = 2 is larger than layer .*shared_expert_gate.* at most 1"):
        adapted(tmp_path, "causal-lm", adapter__targets="shared_expert_gate")
    with pytest.raises(AdapterError, match="rank = 99 is larger than every layer"):
        adapted(tmp_path, "causal-lm", adapter__targets="all-linear", adapter__rank=99)
    assert adapted(tmp_path, "causal-lm")[0].notes == ()


DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 0, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "named", "kept"),
    [
        (  # a router that gives two tensors
            lambda: transformers.PhimoeForCausalLM(
                transformers.PhimoeConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=2, **SMALL)
            ),
            "router",
            "q_proj",
        ),
        (  # whose kernel reads weights past any adapter
            lambda: transformers.MambaForCausalLM(
                transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1)
            ),
            "out_proj",
            "in_proj",
        ),
        (  # shared experts, by the names that PEFT takes for all experts together
            lambda: transformers.DeepseekV3ForCausalLM(
                transformers.DeepseekV3Config(vocab_size=40, **DEEPSEEK, **SMALL)
            ),
            "gate_proj",
            "o_proj",
        ),
        (  # overrides what a linear layer does, and does the same
            lambda: transformers.FalconForCausalLM(
                transformers.FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
            ),
            None,
            "query_key_value",
        ),
    ],
    ids=["phimoe", "mamba", "deepseek", "falcon"],
)
def test_what_peft_cannot_adapt_is_left_out_by_name(
    make: Callable[[], Any], named: str | None, kept: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    if named is not None:
        with pytest.raises(AdapterError, match=rf"'{named}' matches no linear module .* that PEFT adapts"):
            adapted(tmp_path, "causal-lm", adapter__targets=named)
    live, _ = adapted(tmp_path, "causal-lm", adapter__targets="all-linear")
    leaves = {layer.rpartition(".")[2] for layer in live.layers}
    assert kept in leaves
    assert named not in leaves
    assert any("that PEFT cannot adapt here" in note for note in live.notes) is (named is not None)
    tokens = torch.arange(6)[None]
    live.model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(live.parameter(name).grad is not None for name in live.trained)


def test_a_head_with_counted_batches_is_saved_and_read(tmp_path: Path) -> None:
    levit = transformers.LevitConfig(
        image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )
    transformers.LevitForImageClassification(levit).save_pretrained(tmp_path)
    live, _ = adapted(tmp_path, "image-classification", adapter__targets="all-linear", adapter__head="frozen")
    assert any(name.endswith("num_batches_tracked") for name in live.frozen)
    assert live.frozen_hash


def test_an_unknown_tensor_is_not_loaded(bases: Path) -> None:
    live, _ = adapted(bases / "bert", "sequence-classification")
    with pytest.raises(AdapterError, match="does not belong to this adapter"):
        live.load({"nonsense": torch.ones(1)}, 1.0)


def test_a_pooler_that_nobody_has_trained_is_trained_with_the_head(tmp_path: Path) -> None:
    model = BASES["bert"]()
    for bias, name in ((0.0, "drawn"), (0.01, "trained")):
        torch.nn.init.constant_(model.pooler.dense.bias, bias)
        model.save_pretrained(tmp_path / name)
    drawn, _ = adapted(tmp_path / "drawn", "sequence-classification")
    trained, _ = adapted(tmp_path / "trained", "sequence-classification")
    assert drawn.base.head == ("classifier", "bert.pooler.dense")
    assert trained.base.head == ("classifier",)
    pooler = drawn.initial["base_model.model.bert.pooler.dense.weight"]
    assert torch.equal(pooler, model.pooler.dense.weight)  # as the checkpoint has it, and as all clients do


def test_layers_of_different_ranks_and_scalings_are_saved_as_peft_reads_them(bases: Path, tmp_path: Path) -> None:
    live, config = adapted(bases / "llama", "causal-lm")
    state = AdapterState.from_tensors(live.initial, 2.0)
    torch.manual_seed(5)
    ranks = dict(zip(state.factors, (3, 1), strict=True))
    factors = {
        layer: LoraFactors(torch.randn(r, f.A.shape[1]), torch.randn(f.B.shape[0], r), 0.5 * r)
        for (layer, f), r in zip(state.factors.items(), ranks.values(), strict=True)
    }
    live.save(tmp_path, AdapterState(factors), ())
    base = load_base(config, bases / "llama", ())
    loaded = PeftModel.from_pretrained(base.model, str(tmp_path))
    for layer, f in factors.items():
        module = loaded.get_submodule(layer)
        assert torch.equal(module.lora_A["default"].weight, f.A)
        assert torch.equal(module.lora_B["default"].weight, f.B)
        assert module.scaling["default"] == f.scaling


@pytest.mark.parametrize(("name", "task"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_changed_base_computes_as_the_one_adapter_that_holds_all(
    name: str, task: str, init: str, bases: Path, tmp_path: Path
) -> None:
    """GPT-2 holds its weights the other way round; pissa has taken something out of them already."""
    live, config = adapted(bases / name, task, adapter__init=init)
    before = logits(live.model, task)
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=draw)

    state = AdapterState.from_tensors(
        {key: tensor + normal(*tensor.shape) for key, tensor in live.initial.items()}, live.scaling
    )
    for rank in (1, 12):  # as factors, and as a matrix
        steps = {
            layer: as_step(normal(f.B.shape[0], rank), normal(rank, f.A.shape[1]), f.A)
            for layer, f in state.factors.items()
        }
        state = AdapterState(state.factors, state.dense, advance(state.base, steps))
    live.load(state.to_tensors(), live.scaling)
    moved = logits(live.model, task)
    live.save(tmp_path, exact_sum(state), ("a", "b", "c"))
    base = load_base(config, bases / name, () if task == "causal-lm" else ("a", "b", "c"))
    alone = logits(PeftModel.from_pretrained(base.model, str(tmp_path)), task)
    torch.testing.assert_close(alone, moved, rtol=1e-4, atol=1e-5)
    live.load(live.initial, live.scaling)
    assert torch.equal(logits(live.model, task), before)
    assert not torch.allclose(moved, before, atol=1e-2)
