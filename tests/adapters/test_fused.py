from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedpeft.adapters.fused import fuse

D_IN, D_OUT, RANK = 12, 20, 3


class Base(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, D_OUT, bias=bias), nn.Linear(D_OUT, D_IN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def pair(bias: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return one adapted model twice: as PEFT runs it, and by the short way."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        settings = LoraConfig(r=RANK, lora_alpha=7, target_modules=["first", "second"], **options)
        model: Any = get_peft_model(Base(bias).to(dtype), settings)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(
                    parameter.shape, dtype=max(dtype, torch.float32, key=lambda each: each.itemsize)
                )
        models.append(model)
    assert fuse(models[1]) == 2
    return models[0], models[1]


def gradients(model: nn.Module, x: Tensor, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = model(x)
    (y.double() ** 2).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), found | {"x": x.grad}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, D_IN), (2, 4, D_IN), (0, D_IN)])
def test_the_short_way_has_pefts_outputs_and_gradients(bias: bool, shape: tuple[int, ...]) -> None:
    theirs, ours = pair(bias, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    (y, wanted), (z, found) = gradients(theirs, x), gradients(ours, x)
    torch.testing.assert_close(z, y)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_over_a_16_bit_base_it_is_as_near_to_the_truth_as_peft() -> None:
    theirs, ours = pair(dtype=torch.bfloat16)
    exact, _ = pair(dtype=torch.bfloat16)
    exact.float()
    x = torch.randn(64, D_IN)
    (y, _), (z, _), (truth, _) = gradients(theirs, x, bf16=True), gradients(ours, x, bf16=True), gradients(exact, x)
    assert z.dtype == y.dtype == torch.bfloat16
    assert (z - truth).norm() < 1.2 * (y - truth).norm()


def test_a_factor_that_is_not_trained_has_no_gradient() -> None:
    _, ours = pair()
    for name, parameter in ours.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    _, found = gradients(ours, torch.randn(5, D_IN))
    assert {name.split(".")[-3] for name in found if name != "x"} == {"lora_B"}


def test_scores_are_pefts_to_the_last_bit() -> None:
    theirs, ours = pair()
    x = torch.randn(64, D_IN)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_hooks_dropout_and_a_switched_off_adapter_go_pefts_own_way() -> None:
    _, ours = pair()
    seen = []
    layer: Any = next(module for name, module in ours.named_modules() if name.endswith("first.lora_A.default"))
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    ours(torch.randn(5, D_IN))
    handle.remove()
    ours(torch.randn(5, D_IN))
    assert len(seen) == 1
    theirs, dropping = pair(lora_dropout=0.5)
    x = torch.randn(5, D_IN)
    results = []
    for model in (theirs, dropping):
        torch.manual_seed(3)
        results.append(model.train()(x))
    assert torch.equal(*results)
    with ours.disable_adapter():  # type: ignore[operator]
        assert torch.equal(ours(x), ours.get_base_model()(x))  # type: ignore[operator]
