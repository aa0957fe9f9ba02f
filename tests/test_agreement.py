"""Tokenizer, processor and model: what disagrees is refused in one line or mended exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.agreement import agree
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import DataError, ModelError
from fedpeft.models import BaseModel, base_folder, load_base
from fedpeft.resident import Resident
from fedpeft.tasks.encoding import encode_rows
from fedpeft.tasks.losses import mean_loss
from fedpeft.training.local import Turn, train_locally

WORDS = [f"w{i}" for i in range(37)]
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TEXT: dict[str, Any] = {"vocab_size": 40, **SMALL}
BOTH: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
BART = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}


def tokenizer(folder: Path, pad: str = "[PAD]", *, ends: bool = False, more: str | None = None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", pair="$A [EOS] $B:1 [EOS]:1", special_tokens=[("[EOS]", 2)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token=pad, eos_token="[EOS]"
    )
    if more:
        fast.add_tokens([more])
    fast.save_pretrained(folder)


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., Path]:
    """Save a model, with a tokenizer or the processor that is given."""

    def save(model: Any, processor: Any = None, edit: dict[str, Any] | None = None, **settings: Any) -> Path:
        model.save_pretrained(tmp_path)
        if processor is None:
            tokenizer(tmp_path, **settings)
        else:
            processor.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (edit or {})))
        return tmp_path

    torch.manual_seed(0)
    return save


def configure(folder: Path, task: str = "sequence-classification", **settings: Any) -> RunConfig:
    own = {name.replace("__", "."): value for name, value in settings.items()}
    return resolve(
        [nest({"model.name": str(folder), "model.task": task, "data.max_length": 24, "adapter.rank": 2, **own})]
    )


def agreed(folder: Path, task: str = "sequence-classification", **settings: Any) -> BaseModel:
    config = configure(folder, task, **settings)
    loaded = load_base(config, base_folder(config.model), () if task == "causal-lm" else ("a", "b", "c"))
    agree(loaded, config)
    return loaded


def refused(folder: Path, task: str = "sequence-classification", **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        agreed(folder, task, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("told", "pad", "ends"), [(5, "[PAD]", False), (0, "[EOS]", True), (None, "[EOS]", True)])
def test_a_rows_scores_are_the_same_alone_and_beside_longer_ones(
    told: int | None, pad: str, ends: bool, base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = base(transformers.LlamaModel(transformers.LlamaConfig(pad_token_id=told, **TEXT)), pad=pad, ends=ends)
    loaded = agreed(folder)
    rows = tmp_path / "rows.jsonl"
    texts = ["w1 w2", f"w3 {pad} w4", f"w5 {pad}", "w6 w7 w8 w9 w10 w11"]
    rows.write_text("".join(json.dumps({"text": text, "label": "abc"[i % 3]}) + "\n" for i, text in enumerate(texts)))
    split = encode_rows(configure(folder), folder, rows)

    def scores(*chosen: int) -> torch.Tensor:
        with torch.no_grad():
            return loaded.model(**split.batch(chosen)).logits  # type: ignore[no-any-return]

    torch.testing.assert_close(scores(0, 1, 2, 3), torch.cat([scores(row) for row in range(4)]))


def test_a_model_that_counts_positions_from_its_padding_has_that_padding(base: Callable[..., Path]) -> None:
    make = transformers.RobertaConfig
    assert agreed(base(transformers.RobertaModel(make(pad_token_id=0, **TEXT)))).head == ("classifier",)
    said = refused(base(transformers.RobertaModel(make(pad_token_id=1, **TEXT))))
    assert "pads with token 0 ('[PAD]')" in said
    assert "counts its positions from padding token 1" in said


@pytest.mark.parametrize(
    ("model", "reads"),
    [
        (transformers.RobertaConfig(max_position_embeddings=20, pad_token_id=0), 19),
        (transformers.XLMRobertaConfig(max_position_embeddings=20, pad_token_id=1), 18),
        (transformers.MPNetConfig(max_position_embeddings=20), 18),
        (transformers.BertConfig(max_position_embeddings=20), 20),
        (transformers.GPT2Config(n_positions=20), 20),
        (transformers.MptConfig(max_seq_len=20), 20),
        (transformers.DebertaV2Config(max_position_embeddings=20, position_biased_input=False), None),
        (transformers.T5Config(n_positions=20), None),
        (transformers.XLNetConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_a_row_may_be_as_long_as_the_models_positions_last(
    model: Any, reads: int | None, tmp_path: Path, text_csv: Path
) -> None:
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    config = configure(tmp_path, data__max_length=21)
    if reads is None:
        encode_rows(config, tmp_path, text_csv)
        return
    with pytest.raises(DataError, match=rf"data.max_length = 21, but the model reads {reads} tokens"):
        encode_rows(config, tmp_path, text_csv)
    encode_rows(configure(tmp_path, data__max_length=reads), tmp_path, text_csv)


def test_a_token_counts_once_a_row_holds_it(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(transformers.BertModel(transformers.BertConfig(**TEXT)), more="later")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\nw1 w2,a\nw3,b\nw4,c\n")
    assert len(encode_rows(configure(folder), folder, rows)) == 3
    rows.write_text("text,label\nw1 later,a\nw3,b\nw4,c\n")
    with pytest.raises(ModelError, match=r"makes token 40 \('later'\), but the model has 40 embeddings"):
        encode_rows(configure(folder), folder, rows)


def test_token_types_are_left_to_models_that_read_them(base: Callable[..., Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,other,label\nw1 w2,w3,a\nw3,w4,b\n")
    kinds = {
        "bert": (transformers.BertModel(transformers.BertConfig(**TEXT)), True),
        "llama": (transformers.LlamaModel(transformers.LlamaConfig(pad_token_id=0, **TEXT)), False),
        "one": (transformers.BertModel(transformers.BertConfig(type_vocab_size=1, **TEXT)), None),
    }
    for name, (model, read) in kinds.items():
        folder = base(model, ends=True)
        path = folder / "tokenizer_config.json"
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | names))
        config = configure(folder, data__text_pair="other")
        if read is None:
            with pytest.raises(ModelError, match=r"token type 1, but the model has 1 \(type_vocab_size\)"):
                encode_rows(config, folder, rows)
        else:
            split = encode_rows(config, folder, rows)
            assert ("token_type_ids" in split.batch([0])) is read, name
            agreed(folder, data__text_pair="other")


def test_padding_that_leaks_into_scores_is_found(base: Callable[..., Path]) -> None:
    fnet = transformers.FNetConfig(vocab_size=40, num_hidden_layers=1, hidden_size=16, intermediate_size=24)
    assert "beside longer rows" in refused(base(transformers.FNetModel(fnet)))
    xlnet = transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24)
    assert "beside longer rows" in refused(base(transformers.XLNetModel(xlnet)))


def test_encoder_decoders_classify_but_are_no_language_models(base: Callable[..., Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\nw1 w2,a\nw3 [EOS] w4,b\n")
    t5 = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, **BOTH)
    bart = transformers.BartConfig(vocab_size=40, d_model=16, max_position_embeddings=32, **BART, **BOTH)
    for model in (
        transformers.T5ForConditionalGeneration(t5),
        transformers.BartForConditionalGeneration(bart),
    ):
        folder = base(model, ends=True)
        assert agreed(folder).head == ("classification_head",)
        with pytest.raises(DataError, match=r"row 2 of .* holds an end token \('\[EOS\]'\) in its own text"):
            encode_rows(configure(folder), folder, rows)
        assert "its decoder alone would be trained" in refused(folder, "causal-lm")
    tokenizer(folder)  # which writes no end token, that BART reads its scores at
    assert "<eos>" in refused(folder)
    whisper = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(whisper))
    assert "whisper model (WhisperForConditionalGeneration)" in refused(folder, "causal-lm")
    assert "for sequence-classification. Take another base" in refused(folder)


def test_a_language_model_does_not_see_what_it_predicts(base: Callable[..., Path], monkeypatch: Any) -> None:
    config = transformers.BertConfig(**TEXT)
    folder = base(transformers.BertForMaskedLM(config))
    assert "made to fill in masks" in refused(folder, "causal-lm")
    config.is_decoder = True
    assert agreed(base(transformers.BertLMHeadModel(config)), "causal-lm").head == ()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(initializer_range=0.5, **TEXT))
    folder = base(llama)
    assert agreed(folder, "causal-lm").head == ()
    forward = transformers.LlamaForCausalLM.forward

    def leaking(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        output = forward(self, input_ids=input_ids, **inputs)
        output.logits = output.logits + (input_ids * inputs["attention_mask"]).sum(1)[:, None, None]
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", leaking)
    assert "is no causal language model" in refused(folder, "causal-lm")


def test_a_model_of_another_kind_is_named_with_what_it_is_for(base: Callable[..., Path]) -> None:
    folder = base(transformers.BertModel(transformers.BertConfig(**TEXT)))
    said = refused(folder, "image-classification")
    assert "is a bert model (BertModel)" in said
    assert "It has some for sequence-classification: set model.task" in said  # as a language model it is refused too
    vit = base(transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)))
    assert "no model of that type for causal-lm" in refused(vit, "causal-lm")


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_the_run_decides_what_is_trained(kind: str, base: Callable[..., Path], tmp_path: Path) -> None:
    edit = {
        "problem_type": kind,
        "return_dict": False,
        "torchscript": True,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    folder = base(transformers.BertModel(transformers.BertConfig(hidden_dropout_prob=0, **TEXT)), edit=edit)
    loaded = agreed(folder)
    (note,) = loaded.notes
    assert f"problem_type = '{kind}'" in note
    assert "cross-entropy of 3 labels" in note
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\nw1 w2,a\nw3,b\nw4,c\n")
    config = configure(folder, train__batch_size=3, train__local_steps=1)
    split = encode_rows(config, folder, rows)
    batch = split.batch(range(3))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(loaded.model(**batch).logits, batch["labels"])
    result = train_locally(
        AdaptedModel(loaded, config),
        split,
        torch.arange(3).numpy(),
        config.train,
        Turn(0, "c", 1, 1),
    )
    assert result.loss == pytest.approx(float(expected), rel=0.05)  # attention's dropout is left


def test_a_router_s_own_loss_is_not_trained(base: Callable[..., Path]) -> None:
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**experts, **TEXT))
    assert agreed(base(mixtral), "causal-lm").notes == ()


def test_a_saved_head_counts_for_its_own_labels(base: Callable[..., Path]) -> None:
    def head(names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(id2label=dict(enumerate(names)), **TEXT)
        )
        model.classifier.bias.data = torch.arange(3.0)
        loaded = agreed(base(model))
        return model.classifier.weight.data, loaded.model.classifier.weight.data, loaded.notes

    for names in (("a", "b", "c"), ("LABEL_0", "LABEL_1", "LABEL_2")):
        saved, used, notes = head(names)
        assert torch.equal(saved, used)
        assert notes == ()
    saved, used, notes = head(("c", "A", "b"))
    assert torch.equal(saved[[1, 2, 0]], used)
    assert "in another order" in notes[0]
    saved, used, notes = head(("x", "b", "c"))
    assert not torch.isclose(saved, used).any()
    assert "drawn anew" in notes[0]
    assert torch.equal(used, head(("y", "b", "c"))[1])  # from the run's seed


def test_weights_of_another_model_are_refused(base: Callable[..., Path]) -> None:
    bert = transformers.BertModel(transformers.BertConfig(**TEXT))
    assert "such as bert.encoder.layer.1." in refused(base(bert, edit={"num_hidden_layers": 2}))
    assert "word_embeddings.weight" in refused(base(bert, edit={"vocab_size": 50}))
    damaged = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    damaged.lm_head.weight.data.fill_(float("nan"))
    assert "not finite" in refused(base(damaged), "causal-lm")


def test_an_adapter_in_a_bases_folder_is_refused_by_name(base: Callable[..., Path], tmp_path: Path) -> None:
    import peft

    bert = transformers.BertModel(transformers.BertConfig(**TEXT))
    folder = base(bert)
    bert.name_or_path = bert.config._name_or_path = "some/base"
    adapted = peft.get_peft_model(bert, peft.LoraConfig(r=2, target_modules=["query"]))
    adapted.save_pretrained(folder / "inner")
    assert "not a model. Give its base, 'some/base', as model.name" in refused(folder / "inner")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "an adapter of PEFT (LORA) beside the model" in refused(folder)
    (folder / "adapter_config.json").unlink()
    adapted.base_model.model.save_pretrained(folder)
    assert "adapter's layers" in refused(folder)


def image_base(base: Callable[..., Path], size: int = 8, channels: int = 3, **processor: Any) -> Path:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=channels, **SMALL)
    made = ViTImageProcessorPil(size={"height": size, "width": size}, **processor)
    return base(transformers.ViTForImageClassification(config), made)


def test_images_of_another_size_than_the_models_are_refused(base: Callable[..., Path]) -> None:
    said = refused(image_base(base, size=16), "image-classification")
    assert "(16*16) doesn't match model (8*8)" in said
    assert "image_size = 8" in said
    swin = transformers.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=2)
    folder = base(transformers.SwinForImageClassification(swin), ViTImageProcessorPil(size={"height": 24, "width": 24}))
    assert agreed(folder, "image-classification").head == ("classifier",)  # which reads any size


def test_a_processor_for_other_channels_serves_where_that_changes_no_value(
    base: Callable[..., Path], image_folder: Path
) -> None:
    for channels, mean in ((1, [0.5, 0.5, 0.5]), (3, [0.5])):
        folder = image_base(base, channels=channels, image_mean=mean, image_std=mean, do_convert_rgb=True)
        agreed(folder, "image-classification")
        split = encode_rows(configure(folder, "image-classification"), folder, image_folder)
        assert split.batch([0])["pixel_values"].shape == (1, channels, 8, 8)
    said = refused(image_base(base, channels=1, image_mean=[0.4, 0.5, 0.6]), "image-classification")
    assert "3 different values of image_mean" in said
    assert "none may be 0" in refused(image_base(base, image_std=[0, 0.5, 0.5]), "image-classification")
    assert "4 channels" in refused(image_base(base, channels=4), "image-classification")


def test_a_model_that_computes_no_loss_of_its_own_trains_as_others_do(
    base: Callable[..., Path], image_folder: Path
) -> None:
    config = transformers.DeiTConfig(image_size=8, patch_size=4, **SMALL)
    folder = base(
        transformers.DeiTForImageClassificationWithTeacher(config), ViTImageProcessorPil(size={"height": 8, "width": 8})
    )
    chosen = configure(
        folder, "image-classification", data__source=str(image_folder), partition__scheme="iid", federation__clients=1
    )
    home = Resident(chosen)
    home.adapted.begin_training(home.adapted.trained)
    assert set(home.adapted.base.head) == {"cls_classifier", "distillation_classifier"}
    mean_loss(home.adapted.task, home.adapted.model, home.data.train.batch(range(4))).backward()
    assert all(home.adapted.parameter(name).grad is not None for name in home.adapted.trained)


def test_a_processor_that_makes_no_images_is_refused(base: Callable[..., Path]) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    vision = {"num_patches": 4, "patch_size": 4, **SMALL}
    model = transformers.Siglip2ForImageClassification(transformers.Siglip2Config(vision_config=vision))
    folder = base(model, Siglip2ImageProcessorPil(patch_size=4, max_num_patches=4))
    assert "makes pixel_values of shape (1, 4, 48)" in refused(folder, "image-classification")


def test_whatever_a_folders_files_raise_is_one_line(base: Callable[..., Path]) -> None:
    folder = base(transformers.BertModel(transformers.BertConfig(**TEXT)), edit={"pad_token_id": 999})
    assert "cannot load" in refused(folder)
    folder = base(transformers.BertModel(transformers.BertConfig(**TEXT)))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": "many"}))
    agreed(folder)  # data.max_length alone counts
    (folder / "tokenizer.json").write_text("[]")
    assert "has no tokenizer that can be loaded" in refused(folder)
