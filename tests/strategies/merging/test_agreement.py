"""Adapters that differ in meaning do not merge without a word, and what merges is loaded by PEFT."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, VeloraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpeft.adapters.export import ADAPTER_CONFIG, ADAPTER_TENSORS
from fedpeft.adapters.lora_fields import LORA_FIELDS, Meaning
from fedpeft.errors import AdapterError, FedpeftError
from fedpeft.strategies.merging.merge import merge_directories

SET: dict[str, Any] = {  # a value of each field that is not its default
    "use_dora": True,
    "lora_bias": True,
    "layer_replication": [[0, 1], [0, 2]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "fan_in_fan_out": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [5, 6],
    "target_parameters": ["mlp.experts.down_proj"],
    "ensure_weight_tying": True,
    "base_model_name_or_path": "other",
    "revision": "main",
    "task_type": "SEQ_CLS",
    "exclude_modules": ["o_proj"],
    "layers_to_transform": [0, 1],
    "layers_pattern": ["layers"],
    "target_modules": ["self_attn.q_proj"],
    "auto_mapping": {"base_model_class": "LlamaModel"},
    "peft_version": "0.9.0",
    "inference_mode": False,
    "lora_dropout": 0.5,
    "megatron_core": "megatron",
    "qalora_group_size": 4,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "init_lora_weights": "gaussian",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"cache_file": "x"},
    "lora_ga_config": {"direction": "random"},
    "velora_config": {"num_groups": 2},
}


def llama(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder).eval()


def save(base: Any, out: Path, seed: int, **settings: Any) -> Path:
    """Save an adapter of drawn numbers with PEFT alone."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return out


def load(base: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(base, str(folder)).eval()


def deltas(model: Any) -> dict[str, Tensor]:
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("pair")
    return [save(llama(tiny_llama), home / str(seed), seed, task_type="CAUSAL_LM") for seed in range(2)]


def changed(source: Path, out: Path, **fields: Any) -> Path:
    shutil.copytree(source, out)
    config = json.loads((out / ADAPTER_CONFIG).read_text())
    (out / ADAPTER_CONFIG).write_text(json.dumps({**config, **fields}))
    return out


def with_tensor(source: Path, out: Path, name: str, tensor: Tensor) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / ADAPTER_TENSORS)
    save_file({**tensors, name: tensor}, out / ADAPTER_TENSORS)
    return out


def refused(paths: list[Path], out: Path, says: str, **settings: Any) -> None:
    with pytest.raises(FedpeftError, match=says) as caught:
        merge_directories("flexlora", paths, out, **settings)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_every_field_of_pefts_configuration_has_a_known_meaning() -> None:
    """A release of PEFT that adds a field fails here: say in `LORA_FIELDS` what the field does to s B A."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == set(LORA_FIELDS)
    factors = {name for name, meaning in LORA_FIELDS.items() if meaning is Meaning.FACTORS}
    assert fields - factors - {"peft_type"} == set(SET)  # each of which is tried below


def of(meaning: Meaning) -> list[str]:
    return [name for name, found in LORA_FIELDS.items() if found is meaning and name != "peft_type"]


@pytest.mark.parametrize("field", of(Meaning.REFUSED))
def test_what_makes_the_update_something_else_is_refused_even_where_all_adapters_have_it(
    field: str, pair: list[Path], tmp_path: Path
) -> None:
    odd = [changed(path, tmp_path / path.name, **{field: SET[field]}) for path in pair]
    refused(odd, tmp_path / "out", rf"has {field} = .*only LoRA")


@pytest.mark.parametrize("field", of(Meaning.SAME))
def test_what_must_be_the_same_is_refused_where_it_differs(field: str, pair: list[Path], tmp_path: Path) -> None:
    odd = changed(pair[1], tmp_path / "odd", **{field: SET[field]})
    refused([pair[0], odd], tmp_path / "out", rf"{field}: '.*0' has None, '.*odd' has ")


@pytest.mark.parametrize("field", of(Meaning.AGREE))
def test_what_is_unset_agrees_with_anything_and_what_is_set_is_written(
    field: str, pair: list[Path], tmp_path: Path
) -> None:
    first, second = (changed(path, tmp_path / path.name, **{field: None}) for path in pair)
    told = changed(pair[1], tmp_path / "told", **{field: SET[field]})
    merge_directories("flexlora", [first, told, second], tmp_path / "out")
    assert json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())[field] == SET[field]
    other = changed(pair[1], tmp_path / "other", **{field: "another"})
    refused([first, told, other], tmp_path / "no", rf"{field}: '.*told' has {SET[field]}, '.*other' has another")


@pytest.fixture(scope="module")
def merged_deltas(pair: list[Path], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What PEFT adds to each layer for the pair merged as it is."""
    out = tmp_path_factory.mktemp("plain") / "out"
    merge_directories("flexlora", pair, out)
    return deltas(load(llama(tiny_llama), out))


@pytest.mark.parametrize("field", of(Meaning.IDLE) + of(Meaning.START) + of(Meaning.LAYERS))
def test_what_changes_nothing_of_an_update_changes_nothing_of_the_result(
    field: str, pair: list[Path], merged_deltas: dict[str, Tensor], tiny_llama: Path, tmp_path: Path
) -> None:
    together = {"layers_to_transform": [0, 1]} if field == "layers_pattern" else {}  # PEFT insists on it
    odd = changed(pair[0], tmp_path / "odd", **together, **{field: SET[field]})
    merge_directories("flexlora", [odd, pair[1]], tmp_path / "out")
    written = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    assert not any(name in written for name in of(Meaning.START))
    found = deltas(load(llama(tiny_llama), tmp_path / "out"))
    assert found.keys() == merged_deltas.keys()
    for layer, delta in merged_deltas.items():
        torch.testing.assert_close(found[layer], delta)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_quantum": 3}, "use_quantum = 3, which is no field of LoRA that is known here"),
        ({"init_lora_weights": "corda"}, "'corda', which changes the base .*path_initial_model"),
        ({"init_lora_weights": "loftq"}, "'loftq', which changes the base: only"),
        ({"init_lora_weights": "warp"}, "'warp', which is not known here"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type = 'PROMPT_TUNING'"),
        ({"peft_type": None}, "peft_type = 'None'"),
        ({"target_parameters": "set()"}, r"target_parameters = 'set\(\)', which is no list of names \(write \[\]"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head', which is no list"),
        ({"r": 4}, "has rank 2, where adapter_config.json says 4"),
        ({"r": "two"}, "ranks or alphas cannot be read"),
        ({"alpha_pattern": ["q"]}, "ranks or alphas cannot be read"),
        ({"rank_pattern": {"(": 2}}, "ranks or alphas cannot be read"),
    ],
)
def test_configurations_that_are_not_understood_are_refused_by_name(
    fields: dict[str, Any], says: str, pair: list[Path], tmp_path: Path
) -> None:
    refused([changed(pair[0], tmp_path / "odd", **fields)], tmp_path / "out", says)


def test_fields_that_are_unknown_and_unset_say_nothing(pair: list[Path], tmp_path: Path) -> None:
    odd = changed(pair[1], tmp_path / "odd", use_quantum=False, quantum_config=None, quanta=[])
    merge_directories("flexlora", [pair[0], odd], tmp_path / "out")


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(2, 63), "or the other one is not there"),
        (f"{LAYER}.lora_magnitude_vector", torch.zeros(16), "without magnitudes"),
        (f"{LAYER}.lora_B.bias", torch.zeros(16), "biases of its own"),
        (f"{LAYER}.conv.lora_A.weight", torch.zeros(2, 3, 1, 1), "no factor of a linear layer"),
        ("base_model.model.model.norm.weight", torch.zeros(16), "explained by nothing in adapter_config.json"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.zeros(2, 16), "explained"),
        (f"{LAYER}.base_layer.bias", torch.zeros(16), "explained by nothing"),
        ("base_model.model.lm_head.weight", torch.full((63, 16), torch.inf), "NaN or infinity"),
        ("base_model.model.lm_head.weight", torch.zeros(63, 16, dtype=torch.int8), "torch.int8, which has no mean"),
    ],
)
def test_tensors_that_no_field_explains_are_refused_by_name(
    name: str, tensor: Tensor, says: str, pair: list[Path], tmp_path: Path
) -> None:
    refused([with_tensor(pair[0], tmp_path / "odd", name, tensor)], tmp_path / "out", says)


@pytest.mark.parametrize("tokens", [[5, 6], {"embed_tokens": [5, 6]}])
def test_rows_of_the_same_tokens_are_averaged_and_those_of_others_are_not(
    tokens: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    paths = [save(llama(tiny_llama), tmp_path / str(n), n, trainable_token_indices=tokens) for n in range(2)]
    merge_directories("flora", paths, tmp_path / "out", weights=["1", "3"])
    rows = [
        load(llama(tiny_llama), path).get_input_embeddings()(torch.arange(63)) for path in (*paths, tmp_path / "out")
    ]
    torch.testing.assert_close(rows[2], rows[0] / 4 + rows[1] * 3 / 4)
    assert not torch.allclose(rows[0][5:7], rows[1][5:7])
    for number, others in enumerate(([7, 8], [6, 5], {"embed_tokens": [5, 7]})):
        odd = changed(paths[1], tmp_path / f"odd{number}", trainable_token_indices=others)
        refused([paths[0], odd], tmp_path / "no", "trainable_token_indices")


def test_biases_and_saved_modules_are_averaged_and_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tf.Qwen2ForCausalLM(tf.Qwen2Config.from_pretrained(tiny_llama)).eval()
    base.save_pretrained(tmp_path / "base")
    settings = {"bias": "all", "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    paths = [save(llama(tmp_path / "base"), tmp_path / str(n), n, **settings) for n in range(2)]
    merge_directories("flora", paths, tmp_path / "out")
    one, other, merged = (load(llama(tmp_path / "base"), path) for path in (*paths, tmp_path / "out"))
    weights = [dict(model.named_parameters()) for model in (one, other, merged)]
    moved = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name]) and "lora" not in name]
    assert {name.rpartition(".")[2] for name in moved} == {"bias", "weight"}
    for name in moved:
        torch.testing.assert_close(weights[2][name], (weights[0][name] + weights[1][name]) / 2)


@pytest.mark.parametrize("method", ["flora", "flexlora", "lora-lego"])
def test_experts_are_merged_one_by_one(method: str, tmp_path: Path) -> None:
    """PEFT keeps all experts in one pair of matrices, whose product is no update of any of them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "base")
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    own: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 3},
        {"r": 3, "use_rslora": True},
        {"r": 2, "rank_pattern": {r"layers\.1\.mlp\.experts\..*": 1}, "alpha_pattern": {"experts.*": 5}},
    ]
    paths = [save(llama(tmp_path / "base"), tmp_path / str(n), n, **experts, **each) for n, each in enumerate(own)]
    rank = {"lora-lego": {"options": {"rank": 8}}, "flexlora": {"rank": 8}}.get(method, {})
    merged = merge_directories(method, paths, tmp_path / "out", weights=["1", "2", "1"], **rank)
    assert merged.exact
    each = [deltas(load(llama(tmp_path / "base"), path)) for path in paths]
    found = deltas(load(llama(tmp_path / "base"), tmp_path / "out"))
    assert sum(delta.ndim == 3 for delta in found.values()) == 4
    for name, delta in found.items():
        torch.testing.assert_close(delta, each[0][name] / 4 + each[1][name] / 2 + each[2][name] / 4, rtol=0, atol=1e-5)
    odd = changed(paths[0], tmp_path / "odd", rank_pattern={"gate_up_proj": 1})
    refused([odd], tmp_path / "no", "parameters of '.*experts.*' differ in rank or alpha")


def test_embeddings_that_were_resized_and_aids_of_training_are_no_obstacle(tiny_llama: Path, tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        base = llama(tiny_llama)
        base.resize_token_embeddings(70)
        paths.append(save(base, tmp_path / str(number), number, velora_config=VeloraConfig(num_groups=4)))
        assert "base_model.model.lm_head.weight" in load_file(paths[-1] / ADAPTER_TENSORS)
    merge_directories("flexlora", paths, tmp_path / "out")
    base = llama(tiny_llama)
    base.resize_token_embeddings(70)
    mean = sum(load_file(path / ADAPTER_TENSORS)["base_model.model.lm_head.weight"] / 2 for path in paths)
    torch.testing.assert_close(load(base, tmp_path / "out").get_output_embeddings().weight.detach(), mean)


def test_a_base_of_two_paths_is_one_where_its_weights_are(pair: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    twin, sharded, other = tmp_path / "twin", tmp_path / "sharded", tmp_path / "other"
    shutil.copytree(tiny_llama, twin)
    llama(tiny_llama).save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    torch.manual_seed(1)
    tf.LlamaForCausalLM(tf.LlamaConfig.from_pretrained(tiny_llama)).save_pretrained(other)
    moved = [
        changed(pair[1], tmp_path / f"on-{place.name}", base_model_name_or_path=str(place))
        for place in (twin, sharded, other, tmp_path / "away")
    ]
    for adapter in moved:
        refused([pair[0], adapter], tmp_path / "out", r"base_model_name_or_path: .*--base FOLDER")
    for number, place in enumerate((twin, sharded)):
        out = tmp_path / f"out{number}"
        merged = merge_directories("flexlora", [pair[0], moved[number]], out, base=str(place))
        assert "the same weights as" in merged.base
        assert "without" not in merged.base
        assert json.loads((out / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(place)
    refused([pair[0], moved[2]], tmp_path / "out", "hold different weights", base=str(tiny_llama))
    refused([pair[0], moved[3]], tmp_path / "out", "no folder here", base=str(tmp_path / "typo"))
    refused(pair, tmp_path / "out", "no folder here", base="")
    refused(pair, tmp_path / "out", r"no config\.json", base=str(tmp_path))
    named = merge_directories("flexlora", [pair[0], moved[3]], tmp_path / "hub", base="owner/llama")
    assert "without comparing weights" in named.base
    revised = changed(moved[0], tmp_path / "revised", revision="v2")
    first = changed(pair[0], tmp_path / "first", revision="v1")
    refused([first, revised], tmp_path / "out", "revision: .* has v1, .* has v2", base=str(twin))


def test_a_merge_that_fails_leaves_nothing_and_one_that_succeeds_follows_links(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fedpeft.adapters.export.save_file", full)
        refused(pair, tmp_path / "out", "cannot write '.*out': No space left on device; give another --out")
    (tmp_path / "file").touch()
    refused(pair, tmp_path / "file" / "out", "cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    merge_directories("flexlora", pair, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / ADAPTER_TENSORS).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link"]


def test_halves_that_overflow_and_weights_that_fill_the_memory_are_refused(pair: list[Path], tmp_path: Path) -> None:
    halves = []
    for path in pair:
        halves.append(tmp_path / path.name)
        shutil.copytree(path, halves[-1])
        tensors = {name: torch.full_like(t, 6e4).half() for name, t in load_file(path / ADAPTER_TENSORS).items()}
        save_file(tensors, halves[-1] / ADAPTER_TENSORS)
    with pytest.raises(AdapterError, match=r"too large for torch\.float16"):
        merge_directories("flora", halves, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for word in ("1e999999999", "1E-4000", "nan", "inf", "0", "", "1/0"):
        refused(pair, tmp_path / "out", "is no positive number", weights=["1", word])


def test_a_hundred_adapters_merge_as_their_mean(pair: list[Path], tmp_path: Path) -> None:
    merged = merge_directories("fedit", pair * 50, tmp_path / "many")
    assert len(merged.inputs) == 100
    merge_directories("fedit", pair, tmp_path / "two")
    two, many = (load_file(tmp_path / name / ADAPTER_TENSORS) for name in ("two", "many"))
    for name, tensor in two.items():
        torch.testing.assert_close(many[name], tensor)
