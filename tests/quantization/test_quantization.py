"""Bases in 4 and 8 bits: what is computed, what is shared, and who refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.config import RunConfig, nest
from fedpeft.errors import ConfigError, ModelError
from fedpeft.models import load_base
from fedpeft.quantization import QUANTIZATIONS, Asked, dense_weight, held_as, num_weights, saved_as
from fedpeft.rescoring import rescore
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import available, with_typed_options

METHODS = ("nf4", "fp4", "int8", "int8-weight-only")
Make = Callable[..., RunConfig]


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_computes_with_the_weight_that_is_said_to_be_its_dense_one(
    method: str, make: Make, llama: Path
) -> None:
    config = make(model__quantization=method)
    base, again = (load_base(config, llama, ()) for _ in range(2))
    plain = load_base(make(), llama, ())
    layers = {name: module for name, module in base.model.named_modules() if held_as(module) is not None}
    assert len(layers) == 7
    assert "lm_head" not in layers
    assert num_weights(base.model) == num_weights(plain.model)
    for name, layer in layers.items():
        layer.train()
        W = dense_weight(layer)
        x = torch.randn(3, W.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ W.T, atol=1e-5, rtol=1e-4)
        original = dense_weight(plain.model.get_submodule(name))
        assert 0 < (W - original).norm() / original.norm() < (0.2 if "4" in method else 0.02)
        assert torch.equal(W, dense_weight(again.model.get_submodule(name)))


@pytest.mark.parametrize("method", METHODS)
def test_layers_whose_inputs_are_no_whole_blocks_stay_as_they_are(method: str, make: Make, odd: Path) -> None:
    base, plain = load_base(make(model__quantization=method), odd, ()), load_base(make(), odd, ())
    said = "2 of 14 layers stay as they are: 96 inputs, which bitsandbytes cannot hold"
    assert [note[: len(said)] for note in base.notes] == ([said] if "4" in method else [])
    for name, layer in plain.model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            off = (dense_weight(base.model.get_submodule(name)) - layer.weight).norm() / layer.weight.norm()
            assert off < {"nf4": 0.1, "fp4": 0.15}.get(method, 0.02)
            assert (off == 0) == ("4" in method and layer.in_features == 96)


def test_a_base_of_which_nothing_could_be_held_in_4_bits_is_refused(
    make: Make, tiny_llama: Path, odd: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ModelError, match=r"'nf4': all layers have 16, 24 inputs.*such as int8"):
        load_base(make(model__quantization="nf4"), tiny_llama, ())
    settings = QUANTIZATIONS.find("nf4").settings
    assert settings is not None
    asked = Asked(torch.float32, ("lm_head",), double=True)
    AutoModelForCausalLM.from_pretrained(odd, quantization_config=settings(asked)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layers of 96 inputs.*on a CPU"):
        load_base(make(), tmp_path, ())


def test_a_dense_weight_has_its_outputs_first_whatever_the_layer() -> None:
    assert dense_weight(nn.Linear(3, 5)).shape == (5, 3)
    assert dense_weight(Conv1D(5, 3)).shape == (5, 3)


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("strategy", sorted(available()))
def test_every_strategy_takes_a_quantised_base_or_refuses_it_by_name(
    strategy: str, method: str, make: Make, tmp_path: Path
) -> None:
    settings = {"strategy__name": strategy, "model__quantization": method}
    if available()[strategy].capabilities.changes_base:
        with pytest.raises(ConfigError, match=rf"strategy '{strategy}' moves the base.*{method}") as caught:
            with_typed_options(make(**settings))
        assert "\n" not in str(caught.value)
        return
    simulate(make(**settings), tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "evaluate"]
    assert losses[-1] != losses[0]


def test_an_adapter_is_scored_over_the_base_that_is_not_quantised(make: Make, tmp_path: Path) -> None:
    simulate(make(model__quantization="nf4"), tmp_path / "run")
    over = [rescore(tmp_path / "run", layer)["loss"] for layer in ({}, nest({"model.quantization": "none"}))]
    assert over[0] != over[1]
    assert over[0] == pytest.approx(over[1], abs=0.05)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapter__kind": "loha"}, "adapter.kind = 'loha' cannot be trained on a quantised base"),
        ({"adapter__kind": "dora"}, "adapter.kind = 'dora' cannot be trained on a quantised base"),
        ({"adapter__init": "pissa"}, "adapter.init = 'pissa' takes a part out of the base"),
        ({"adapter__init": "olora"}, "adapter.init = 'olora' takes a part out of the base"),
    ],
)
def test_what_needs_the_digits_of_the_base_is_refused_before_anything_is_loaded(
    settings: dict[str, str], says: str, make: Make
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        with_typed_options(make(model__quantization="nf4", strategy__name="fedit", **settings))
    assert "\n" not in str(caught.value)


def test_a_base_that_is_saved_quantised_is_read_as_it_is(make: Make, llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = load_base(make(model__quantization="nf4"), llama, ())
    settings = QUANTIZATIONS.find("nf4").settings
    assert settings is not None
    asked = Asked(torch.float32, ("lm_head",), double=True)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=settings(asked)).save_pretrained(tmp_path)
    saved = load_base(make(model__name=str(tmp_path)), tmp_path, ())
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(*(dense_weight(each.model.get_submodule(name)) for each in (made, saved)))
    assert AdaptedModel(saved, make()).layers
    with pytest.raises(ModelError, match="is saved quantised already, as 'nf4'"):
        load_base(make(model__name=str(tmp_path), model__quantization="int8"), tmp_path, ())
    with pytest.raises(ConfigError, match=r"pissa.*nf4"):
        AdaptedModel(load_base(make(), tmp_path, ()), make(adapter__init="pissa"))


@pytest.mark.parametrize(
    ("kind", "says"),
    [("awq", "needs the package gptqmodel.*pip install gptqmodel"), ("odd", "quant_method = 'odd'.*Known: awq")],
)
def test_a_saved_method_that_cannot_be_had_is_named(
    kind: str, says: str, make: Make, llama: Path, tmp_path: Path
) -> None:
    described = json.loads((llama / "config.json").read_text())
    described["quantization_config"] = {"quant_method": kind, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=says):
        load_base(make(), tmp_path, ())


def test_a_method_that_is_missing_or_for_other_devices_is_one_line() -> None:
    with pytest.raises(ModelError, match="computes on cpu, cuda alone, and this process has mps"):
        QUANTIZATIONS.find("nf4").check("mps", "model.quantization = 'nf4'")
    assert saved_as({"load_in_8bit": True}) is QUANTIZATIONS.find("int8")
    assert saved_as({"quant_method": "bitsandbytes", "load_in_4bit": True}) is QUANTIZATIONS.find("fp4")


def test_a_method_of_saved_bases_alone_and_needless_options_are_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization = 'gptq': only a base that was saved so"):
        make(model__quantization="gptq")
    with pytest.raises(ConfigError, match=r"unknown model\.quantization 'nf5'") as caught:
        make(model__quantization="nf5")
    assert not {"awq", "gptq"} & {*str(caught.value).replace(",", "").replace(".", "").split()}
    with pytest.raises(ConfigError, match=r"model\.double_quantization is for model\.quantization = nf4, fp4"):
        make(model__quantization="int8", model__double_quantization="false")
    assert make(model__quantization="none").model.quantization is None
