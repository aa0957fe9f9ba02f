"""What the records say of optimisers, held against what torch does; and the schedules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.training.optimizers import OPTIMIZERS, SCHEDULES

NAMES = sorted(OPTIMIZERS.ours)


def weight_and_gradient() -> tuple[torch.nn.Parameter, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    gradient = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    return torch.nn.Parameter(torch.randn(5, 3, generator=draw, dtype=torch.float64)), gradient


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_what_the_record_says(name: str) -> None:
    record, (weight, gradient) = OPTIMIZERS.find(name), weight_and_gradient()
    before = weight.detach().clone()
    optimizer = record.build({"weight": weight}, 0.01, record.options())
    weight.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach() - before, record.first_step(gradient, 0.01), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_its_state_is_as_large_as_the_record_says(name: str) -> None:
    record, (weight, gradient) = OPTIMIZERS.find(name), weight_and_gradient()
    optimizer = record.build({"weight": weight}, 0.01, record.options())
    weight.grad = gradient
    optimizer.step()
    kept = [t for t in optimizer.state[weight].values() if torch.is_tensor(t) and t.shape == weight.shape]
    assert len(kept) == record.state_floats


@pytest.mark.parametrize("name", NAMES)
def test_every_option_reaches_the_optimizer(name: str) -> None:
    record, (weight, gradient) = OPTIMIZERS.find(name), weight_and_gradient()

    def after(**options: float) -> torch.Tensor:
        stepped = torch.nn.Parameter(weight.detach().clone())
        optimizer = record.build({"weight": stepped}, 0.01, record.options(**options))
        for _ in range(2):
            stepped.grad = gradient.clone()
            optimizer.step()
        return stepped.detach()

    for option in record.options.model_fields:
        assert not torch.equal(after(), after(**{option: 0.5}))


@given(progress=st.floats(0, 1, exclude_max=True), name=st.sampled_from(sorted(SCHEDULES.ours)))
def test_a_schedule_never_leaves_zero_to_one_and_never_rises(progress: float, name: str) -> None:
    factor = SCHEDULES.find(name).factor
    assert factor(0.0) == 1
    assert 0 <= factor(progress) <= 1  # zero only where rounding makes it so
    assert factor(progress) <= factor(progress / 2)
