"""Methods and initialisations that change the base, and layers whose weights cannot be changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.base_change import check_plain
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError
from fedpeft.models import base_folder, load_base
from fedpeft.resident import Resident
from fedpeft.simulations.plan import plan
from fedpeft.strategies import with_typed_options
from fedpeft.strategies.federation import build_strategy

Make = Callable[..., RunConfig]


class Packed(nn.Linear):
    """Two weights of 4 bits a byte, as bitsandbytes keeps them."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features)
        self.full = source.weight.data
        packed = torch.zeros(source.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.full, self.bias)


class Subclass(torch.Tensor):
    """A tensor that says that it is float32, and is not, as torchao's."""


def packed(config: RunConfig) -> Any:
    """Return a base whose query layers hold packed weights."""
    base = load_base(config, base_folder(config.model), ["a", "b"])
    for name, module in list(base.model.named_modules()):
        if name.endswith(".query"):
            parent = base.model.get_submodule(name.rpartition(".")[0])
            parent.query = Packed(cast(nn.Linear, module))
    return base


@pytest.mark.parametrize("method", ["flora", "fedex-lora", "fedit"])
def test_methods_that_change_the_base_refuse_packed_weights_before_any_round(
    method: str, text_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_typed_options(text_config(strategy__name=method))
    monkeypatch.setattr("fedpeft.resident.load_base", lambda *_: packed(config))
    home = Resident(config)
    if method == "fedit":  # changes nothing
        assert build_strategy(config, home).name == method
        return
    says = rf"strategy\.name = '{method}' .* layer '.*query' \(Packed\) holds its weight as uint8 of shape \(128, 1\)"
    with pytest.raises(AdapterError, match=says) as caught:
        build_strategy(config, home)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("fedpeft.simulations.plan.resident", lambda _: home)
    with pytest.raises(AdapterError, match="uint8"):
        plan(config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_base_refuse_packed_weights(init: str, text_config: Make) -> None:
    config = text_config(adapter__init=init)
    with pytest.raises(AdapterError, match=rf"adapter\.init = '{init}' .*Packed"):
        AdaptedModel(packed(config), config)


def test_plain_layers_of_either_orientation_can_be_changed_and_no_others() -> None:
    check_plain({"linear": nn.Linear(3, 5), "transposed": Conv1D(5, 3), "bf16": nn.Linear(3, 5).bfloat16()}, "x")
    odd = nn.Linear(3, 5)
    odd.weight = nn.Parameter(torch.zeros(5, 3).as_subclass(Subclass))
    flat = nn.Linear(4, 6)
    flat.weight = nn.Parameter(torch.zeros(24, 1))
    coarse = nn.Linear(4, 6)
    coarse.weight = nn.Parameter(torch.zeros(6, 4).to(torch.float8_e4m3fn), requires_grad=False)
    quantised = nn.Module()
    quantised.qweight = torch.zeros(3)
    for layer, says in (
        (odd, "as Subclass"),
        (flat, r"\(24, 1\)"),
        (coarse, "float8_e4m3fn"),
        (quantised, "no weight"),
    ):
        with pytest.raises(AdapterError, match=says):
            check_plain({"layer": layer}, "x")
