"""Rows are independent, or the model is refused: over architectures, against a loop over single rows."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from fedpeft.config import nest, resolve
from fedpeft.errors import PrivacyError
from fedpeft.models import torch_seed
from fedpeft.privacy.independence import by_place, probing, row_engine
from fedpeft.resident import Resident
from fedpeft.training.neftune import EmbeddingNoise

SIZES = {"vocab_size": 70, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "pad_token_id": 0}
HEADS = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 64}
GROUPED = {**HEADS, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
DEBERTA = {**HEADS, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
IMAGES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1}

# configuration, adapter.targets, and part of the refusal; None where gradients must be exact
Case = tuple[Callable[[], Any], str | None, str | None]
TEXTS: dict[str, Case] = {
    "bert": (lambda: transformers.BertConfig(**HEADS), None, None),
    "roberta": (lambda: transformers.RobertaConfig(**HEADS), None, None),
    "distilbert": (
        lambda: transformers.DistilBertConfig(vocab_size=70, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
        None,
        None,
    ),
    # one layer that is called twice, on rows both times
    "albert": (lambda: transformers.AlbertConfig(**{**HEADS, "num_hidden_layers": 2}, embedding_size=8), None, None),
    "deberta-v2": (lambda: transformers.DebertaV2Config(**DEBERTA, share_att_key=False), None, None),
    "deberta-v2 positions": (
        lambda: transformers.DebertaV2Config(**DEBERTA, share_att_key=False),
        "pos_query_proj,value_proj",
        r"'deberta\.encoder\.layer\.0\.attention\.self\.pos_query_proj' on a tensor of shape \(1, .*value_proj",
    ),
    "deberta-v2 shared": (
        lambda: transformers.DebertaV2Config(**DEBERTA, share_att_key=True),
        None,
        r"self\.query_proj' on a tensor of shape \(1, .*such as adapter\.targets=value_proj",
    ),
    "deberta-v2 shared, values": (
        lambda: transformers.DebertaV2Config(**DEBERTA, share_att_key=True),
        "value_proj",
        None,
    ),
    "deberta-v3": (
        lambda: transformers.DebertaV2Config(
            **DEBERTA, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0
        ),
        None,
        r"self\.query_proj' on a tensor of shape \(1, ",
    ),
    "modernbert": (
        lambda: transformers.ModernBertConfig(
            **HEADS, global_attn_every_n_layers=1, local_attention=4, cls_token_id=3, sep_token_id=4
        ),
        None,
        None,
    ),
    "longformer": (
        lambda: transformers.LongformerConfig(**HEADS, attention_window=4, sep_token_id=4),
        None,
        r"attention\.self\.query' on a tensor of shape \(\d+, 3, 16\)",  # tokens come first there
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=70, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=2
        ),
        None,
        None,
    ),
    "llama": (lambda: transformers.LlamaConfig(**GROUPED), None, None),
    "qwen2": (lambda: transformers.Qwen2Config(**GROUPED), None, None),
    "gemma": (lambda: transformers.GemmaConfig(**GROUPED, head_dim=8), None, None),
    "phi": (lambda: transformers.PhiConfig(**HEADS, partial_rotary_factor=0.5), None, None),
    "t5": (
        lambda: transformers.T5Config(
            vocab_size=70,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            eos_token_id=2,
            decoder_start_token_id=0,
        ),
        None,
        None,
    ),
    "mixtral": (lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=2), None, None),
    "qwen2-moe": (
        lambda: transformers.Qwen2MoeConfig(**GROUPED, **EXPERTS, num_experts=2, shared_expert_intermediate_size=16),
        "q_proj,up_proj",
        r"mlp\.shared_expert\.\w+' on a tensor of shape \(\d+, 16\)",
    ),
}
PICTURES: dict[str, Case] = {
    "vit": (lambda: transformers.ViTConfig(**IMAGES, intermediate_size=24), None, None),
    "swin": (
        lambda: transformers.SwinConfig(
            image_size=8, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2
        ),
        None,
        r"attention\.q_proj' on a tensor of shape \(12, 4, 16\) where .* 3 rows",
    ),
    "clip": (
        lambda: transformers.CLIPConfig(
            text_config={**HEADS, "eos_token_id": 2},
            vision_config={**IMAGES, "intermediate_size": 24},
            projection_dim=16,
        ),
        None,
        None,
    ),
}
ALL = {**TEXTS, **PICTURES}


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[BOS]", "[EOS]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(64))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [EOS]", special_tokens=[("[CLS]", 3), ("[EOS]", 2)]
    )
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=62, **names)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    texts = folder / "rows.csv"
    with texts.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for index in range(24):
            words = rng.integers(0, 64, rng.integers(3, 12))
            writer.writerow([" ".join(f"w{word}" for word in words), "yes" if index % 2 else "no"])
    for index in range(8):
        place = folder / "images" / f"kind-{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return {"texts": texts, "images": folder / "images"}


MakeHome = Callable[..., Resident]


@pytest.fixture(scope="module")
def make_home(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, sources: dict[str, Path]) -> MakeHome:
    """Return ``make(name)``, a resident model of one architecture, and its rows."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    def make(name: str, config: Any = None, **settings: Any) -> Resident:
        maker, targets, _ = ALL[name]
        config = config or maker()
        config.num_labels = 2
        folder = tmp_path_factory.mktemp("model")
        pictures = name in PICTURES
        kinds = (
            transformers.AutoModelForImageClassification
            if pictures
            else transformers.AutoModelForSequenceClassification
        )
        with torch_seed(1):
            kinds.from_config(config).save_pretrained(folder)
        if pictures:
            ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
        else:
            tokenizer.save_pretrained(folder)
        given = {
            "model.name": str(folder),
            "model.task": "image-classification" if pictures else "sequence-classification",
            "data.source": str(sources["images" if pictures else "texts"]),
            "data.max_length": 32,
            "adapter.rank": 2,
            "federation.clients": 2,
            **({} if targets is None else {"adapter.targets": targets.split(",")}),
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        return Resident(resolve([nest(given)]))

    return make


def alone(home: Resident, row: int) -> dict[str, torch.Tensor]:
    """Return the gradient of one row through the model's own loss."""
    adapted = home.adapted
    for name in adapted.trained:
        adapted.parameter(name).grad = None
    adapted.model(**home.data.train.batch([row])).loss.backward()
    grads = {name: adapted.parameter(name).grad for name in adapted.trained}
    return {n: torch.zeros_like(adapted.parameter(n)) if g is None else g.clone() for n, g in grads.items()}


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_rows_are_exact_or_the_model_is_refused(
    name: str, make_home: MakeHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    # which its class does not name as its trunk
    monkeypatch.setattr(transformers.CLIPForImageClassification, "base_model_prefix", "vision_model")
    home = make_home(name)
    refused = ALL[name][2]
    if refused is not None:
        for _ in range(2):  # also where it is asked again
            with pytest.raises(PrivacyError, match=refused) as error:
                row_engine(home)
            assert "\n" not in str(error.value)
        return
    engine, adapted = row_engine(home), home.adapted
    batch = [0, 3, 5, 1]
    with probing(adapted, 7):
        engine.reset()
        engine.backward(home.data.train.batch(batch), "fp32")
        engine.check([adapted.parameter(n) for n in adapted.trained], len(batch))
        found: dict[str, Any] = {n: adapted.parameter(n).grad_sample for n in adapted.trained}  # type: ignore[attr-defined]
        for place, row in enumerate(batch):
            expected = alone(home, row)
            total = sum(float(g.pow(2).sum()) for g in expected.values()) ** 0.5
            for n, g in expected.items():
                assert float((found[n][place] - g).norm()) <= 1e-4 * float(g.norm()) + 1e-6 * total, n


def test_the_model_is_left_as_it_was(make_home: MakeHome) -> None:
    home = make_home("modernbert")
    adapted = home.adapted
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in adapted.model.named_parameters()}
    rates = {name: dict(vars(module)) for name, module in adapted.model.named_modules()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    engine = row_engine(home)
    assert torch.equal(torch.get_rng_state(), state)
    after = adapted.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: parameter.requires_grad for name, parameter in adapted.model.named_parameters()} == flags
    for name, module in adapted.model.named_modules():
        held = {key: value for key, value in vars(module).items() if isinstance(value, float) or key == "training"}
        assert held == {key: rates[name][key] for key in held}
    assert not any(getattr(adapted.parameter(name), "grad_sample", None) is not None for name in adapted.trained)
    assert row_engine(home) is engine


class OverTheBatch(nn.Module):
    """What a head may do wrong without any shape that tells."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "noise":
            return self.inner(x) + torch.rand_like(x)
        if self.how == "crowd" and len(x) > 8:  # as where some code path is for large batches
            return self.inner(x - 0.05 * x.mean(0, keepdim=True))
        if self.how == "full" and x.shape[1] == 32:  # as where a mask that hides nothing is left out
            return self.inner(x - 0.05 * x.mean(0, keepdim=True))
        if self.how in ("crowd", "full"):
            return self.inner(x)
        if self.how == "mean":
            return self.inner(x - 0.05 * x.mean(0, keepdim=True))
        if self.how == "attention":
            return self.inner(torch.softmax(x.flatten(1) @ x.flatten(1).T, 1) @ x.flatten(1)).view(x.shape)
        return self.inner(x) * (1 + 0.01 * x.shape[1])  # "width": what the longest row makes of it


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("mean", "when ANOTHER row of its batch is replaced"),
        ("width", "when ANOTHER row of its batch is replaced"),
        ("crowd", "when ANOTHER row of its batch is replaced"),
        ("full", "when ANOTHER row of its batch is replaced"),
        ("noise", "draws random numbers in training besides dropout"),
    ],
)
def test_rows_that_are_mixed_without_a_shape_that_tells_are_found(how: str, what: str, make_home: MakeHome) -> None:
    home = make_home("bert")
    layer = home.adapted.model.base_model.model.bert.encoder.layer[0]  # type: ignore[union-attr,index]
    layer.attention.output.dense = OverTheBatch(layer.attention.output.dense, how)
    with pytest.raises(PrivacyError, match=what):
        row_engine(home)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_classifier_that_reads_padding_is_refused(precision: str, make_home: MakeHome) -> None:
    home = make_home("llama", train__precision=precision)
    assert home.adapted.model.config.pad_token_id == 0
    home.adapted.model.config.pad_token_id = 60
    with pytest.raises(PrivacyError, match="ANOTHER row") as error:
        row_engine(home)
    assert "privacy.level=client" in str(error.value)
    home.adapted.model.config.pad_token_id = 0
    assert row_engine(home) is not None


def test_a_weight_that_is_also_used_outside_of_its_layer_is_refused(make_home: MakeHome) -> None:
    home = make_home("bert")
    model: Any = home.adapted.model.base_model.model
    query = model.bert.encoder.layer[0].attention.self.query
    forward = query.forward
    query.forward = lambda x: forward(x) + x @ query.lora_A["default"].weight.T @ query.lora_B["default"].weight.T
    with pytest.raises(PrivacyError, match="in another way than its layer is called"):
        row_engine(home)


def test_a_trained_batch_normalisation_is_refused(make_home: MakeHome) -> None:
    home = make_home("bert")
    model: Any = home.adapted.model.base_model.model
    model.classifier.modules_to_save["default"] = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2))
    head = model.classifier.modules_to_save["default"]
    home.adapted._tensors["base_model.model.classifier.0.weight"] = head[0].weight
    home.adapted.trained = (*home.adapted.trained, "base_model.model.classifier.0.weight")
    for _ in range(2):
        with pytest.raises(PrivacyError, match=r"without gradients of single rows.*adapter\.head=frozen"):
            row_engine(home)


def test_noise_on_embeddings_passes_and_noise_by_the_padded_length_is_found(
    make_home: MakeHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_engine(make_home("llama", train__neftune_alpha=5.0))

    def padded(self: EmbeddingNoise, module: nn.Module, given: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded + by_place(embedded) * 5.0 / embedded[0].numel() ** 0.5  # as transformers' trainer has it

    monkeypatch.setattr(EmbeddingNoise, "_add", padded)
    with pytest.raises(PrivacyError, match="another gradient"):
        row_engine(make_home("llama", train__neftune_alpha=5.0))
