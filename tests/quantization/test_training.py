"""What is trained over a base in few bits, held against the same base as plain matrices and against rows one by one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2Model

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.kinds import KINDS
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError
from fedpeft.exporting import export_merged
from fedpeft.models import load_base, torch_seed
from fedpeft.privacy.independence import probing, row_engine
from fedpeft.quantization import dense_weight, held_as
from fedpeft.rescoring import rescore
from fedpeft.resident import Resident
from fedpeft.simulations.simulate import simulate
from fedpeft.tasks.losses import mean_loss
from fedpeft.training.batched.layers import OwnLayers
from fedpeft.training.batched.together import JointPlainGradients, Part, train_together, why_not
from fedpeft.training.local import Turn, train_locally, training_mode
from fedpeft.training.prefix import feeding
from tests.conftest import WORDS, _tokenizer
from tests.quantization.conftest import Make

METHODS = ("nf4", "int8", "int8-weight-only")
BOTH = {"adapter__targets": "q_proj,down_proj"}  # of which nf4 holds the one and not the other
# where a kind's own sizes are not those of a tiny model
SIZES: dict[str, dict[str, int]] = {
    "c3a": {"adapter__block_size": 32},
    "road": {"adapter__group_size": 32},
    "vblora": {"adapter__vector_length": 32},
    "waveft": {"adapter__n_frequency": 64},
}
TRAINED = sorted(
    name for name, each in KINDS.all().items() if each.quantised and name != "lora-sb"
)  # it needs a gradient
BATCH = {
    "input_ids": torch.tensor([[5, 9, 3, 22, 7], [8, 30, 4, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, 9, 3, 22, 7], [-100, 30, 4, -100, -100]]),
}


def moved(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return other values for an adapter, so that every part of it has a gradient."""
    torch.manual_seed(4)
    start = adapted.initial.items()
    return {name: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t for name, t in start}


def gradients(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return the loss of a batch and its gradients, by name."""
    training_mode(adapted.model)
    parameters = adapted.begin_training(adapted.trained)
    adapted.model.zero_grad()
    with torch_seed(3):  # some draw as they train
        loss = mean_loss(adapted.task, adapted.model, BATCH)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: each.grad for name, each in zip(adapted.trained, parameters, strict=True) if each.grad is not None}
    return {"loss": loss.detach(), **{name: gradient.clone() for name, gradient in found.items()}}


def plain_twin(config: RunConfig, folder: Path, quantised: torch.nn.Module) -> Any:
    """Return the base as plain matrices, which hold what the quantised one computes with."""
    base = load_base(config, folder, ())
    for name, layer in quantised.named_modules():
        if held_as(layer) is not None:
            base.model.get_submodule(name).weight.data = dense_weight(layer).clone()
    return base


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_kind_has_the_gradients_that_it_has_on_the_same_weights_as_plain_matrices(
    kind: str, method: str, make: Make, llama: Path
) -> None:
    settings: dict[str, Any] = {"model__name": str(llama), "adapter__kind": kind, **SIZES.get(kind, {})}
    plain, config = make(**settings), make(**settings, model__quantization=method)
    held = load_base(config, llama, ())
    twin = plain_twin(plain, llama, held.model)
    adapted = [AdaptedModel(held, config), AdaptedModel(twin, plain)]
    values = moved(adapted[1])
    for each in adapted:
        each.load(values, each.scaling)
    found, expected = (gradients(each) for each in adapted)
    assert found.keys() == expected.keys()
    assert len(found) > 1
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * largest, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_rows_are_those_of_each_row_alone(method: str, make: Make, odd: Path) -> None:
    home = Resident(make(model__name=str(odd), model__quantization=method, **BOTH))
    adapted, engine, batch = home.adapted, row_engine(home), [0, 3, 5, 1]
    adapted.load(moved(adapted), adapted.scaling)
    with probing(adapted, 7):
        training_mode(adapted.model)
        engine.reset()
        engine.backward(home.data.train.batch(batch), "fp32")
        engine.check([adapted.parameter(name) for name in adapted.trained], len(batch))
        found: dict[str, Any] = {name: adapted.parameter(name).grad_sample for name in adapted.trained}  # type: ignore[attr-defined]
        for place, row in enumerate(batch):
            for name in adapted.trained:
                adapted.parameter(name).grad = None
            adapted.model(**home.data.train.batch([row])).loss.backward()
            for name in adapted.trained:
                expected = adapted.parameter(name).grad
                assert expected is not None
                assert expected.abs().max() > 0
                torch.testing.assert_close(found[name][place], expected, atol=1e-6, rtol=1e-3)


def test_hidden_states_are_not_kept_of_a_base_that_scores_otherwise_than_it_trains(make: Make, odd: Path) -> None:
    config = make(model__quantization="int8", adapter__layers="last:1", simulation__prefix_cache="on")
    adapted = AdaptedModel(load_base(config, odd, ()), config)
    with pytest.raises(AdapterError, match=r"int8, which .* else in training"), feeding(adapted.model, config):
        pass


@pytest.mark.parametrize("method", ["nf4", "int8-weight-only"])
def test_kept_hidden_states_change_neither_gradients_nor_scores(method: str, make: Make, odd: Path) -> None:
    settings = {"model__name": str(odd), "model__quantization": method, "adapter__layers": "last:1"}
    plain, kept = (make(**settings, simulation__prefix_cache=on) for on in ("off", "on"))
    adapted = AdaptedModel(load_base(kept, odd, ()), kept)
    adapted.load(moved(adapted), adapted.scaling)

    def scored() -> Tensor:
        adapted.model.eval()
        with torch.no_grad():
            return mean_loss(adapted.task, adapted.model, BATCH)

    expected, score = gradients(adapted), scored()
    with feeding(adapted.model, plain):
        assert torch.equal(score, scored())
    with feeding(adapted.model, kept):
        for _ in range(2):
            found = gradients(adapted)
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(scored(), score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_clients_trained_together_hold_what_each_would_hold_alone(method: str, make: Make, odd: Path) -> None:
    home = Resident(make(model__name=str(odd), model__quantization=method, **BOTH))
    adapted, train, layers = home.adapted, home.config.train, OwnLayers(home.adapted)
    assert not why_not(adapted, layers, train)
    parts = [
        Part(moved(adapted), adapted.scaling, rows, Turn(home.config.run.seed, client, 2, 4))
        for client, rows in zip(home.partition.client_ids, home.partition.indices, strict=True)
    ]
    joint = JointPlainGradients(adapted, layers, home.data.train, train, parts)
    for part, together in zip(parts, train_together(adapted, train, parts, adapted.trained, joint), strict=True):
        adapted.load(part.tensors, part.scaling)
        train_locally(adapted, home.data.train, part.rows, train, part.turn, names=adapted.trained)
        for name, tensor in adapted.tensors(adapted.trained).items():
            change = (tensor - part.tensors[name]).norm()
            assert change > 0
            assert (tensor - together.tensors[name]).norm() <= 2e-3 * change


def test_a_merged_model_is_the_base_as_it_was_saved_with_the_adapter(make: Make, odd: Path, tmp_path: Path) -> None:
    config = make(model__name=str(odd), model__quantization="nf4", **BOTH)
    simulate(config, tmp_path / "run")
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {tensor.dtype for tensor in merged.parameters()} == {torch.float32}
    saved = load_base(make(model__name=str(odd)), odd, ()).model
    same = {name for name, tensor in saved.named_parameters() if torch.equal(tensor, merged.get_parameter(name))}
    changed = {name.split(".")[-2] for name, _ in saved.named_parameters()} - {name.split(".")[-2] for name in same}
    assert changed == {"q_proj", "down_proj"}
    test = Resident(config).data.test
    with torch.no_grad():
        loss = merged(**test.batch(list(range(len(test))))).loss
    whole = rescore(tmp_path / "run", {"model": {"quantization": None}})
    assert float(loss) == pytest.approx(whole["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    shape: dict[str, Any] = {"vocab_size": 63, "pad_token_id": 0}
    bert = BertConfig(
        **shape,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    gpt2 = GPT2Config(
        **shape, n_embd=64, n_layer=1, n_head=2, n_inner=128, n_positions=64, bos_token_id=2, eos_token_id=2
    )
    folders = {}
    for name, model in (("bert", BertModel(bert)), ("gpt2", GPT2Model(gpt2))):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        _tokenizer(folders[name])
    rows = folders["bert"].parent / "classes.csv"
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "site"])
        writer.writerows([f"{WORDS[i]} {WORDS[i + 7]}", "ab"[i % 2], f"s{i // 2 % 2}"] for i in range(32))
    return folders | {"rows": rows}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "layers"), [("bert", 6), ("gpt2", 4)])
def test_a_classifier_trains_over_a_quantised_trunk_and_keeps_its_head(
    name: str, layers: int, method: str, make: Make, classifiers: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"model__name": str(classifiers[name]), "data__source": str(classifiers["rows"])}
    settings |= {"model__quantization": method, "data__prompt": None, "data__completion": None}
    config = make(**settings, data__text="text", data__label="label", data__labels="a,b")
    held = load_base(config, classifiers[name], ("a", "b"))
    quantised = {where for where, module in held.model.named_modules() if held_as(module) is not None}
    left = 1 if (name, method) == ("bert", "nf4") else 0  # what is given 96 numbers
    conv = layers if (name, method) == ("gpt2", "int8-weight-only") else 0  # torchao looks for linear layers alone
    assert len(quantised) == layers - left - conv
    assert not any(where.startswith(("classifier", "score")) or "pooler" in where for where in quantised)
    for where in quantised:
        assert dense_weight(held.model.get_submodule(where)).dtype == torch.float32
    outcome = simulate(config, tmp_path / "run")
    assert outcome.error is None


def test_two_workers_hold_what_one_process_holds(make: Make, odd: Path, tmp_path: Path) -> None:
    base = {"model__name": str(odd), "model__quantization": "nf4", "train__optimizer": "adamw-8bit", **BOTH}
    for workers in (0, 2):
        simulate(make(**base, simulation__workers=workers), tmp_path / str(workers))
    alone, beside = (tmp_path / str(n) / "adapter" / "adapter_model.safetensors" for n in (0, 2))
    assert alone.read_bytes() == beside.read_bytes()
