"""What the records say of optimisers, held against what torch and bitsandbytes do, and against rules in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.training.optimizers import OPTIMIZERS, SCHEDULES

NAMES = sorted(OPTIMIZERS.ours)
RATE = 0.01


def kind_of(name: str) -> torch.dtype:
    """Return in what an optimiser can be compared: bitsandbytes' keep their moments in float32 at most."""
    return torch.float32 if OPTIMIZERS.find(name).needs else torch.float64


def weight_and_gradient(name: str, *shape: int) -> tuple[torch.nn.Parameter, Tensor]:
    draw = torch.Generator().manual_seed(3)
    weight, gradient = (torch.randn(shape, generator=draw, dtype=torch.float64).to(kind_of(name)) for _ in range(2))
    return torch.nn.Parameter(weight), gradient


@pytest.mark.parametrize("shape", [(5, 3), (7,)])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_what_the_record_says(name: str, shape: tuple[int, ...]) -> None:
    record, (weight, gradient) = OPTIMIZERS.find(name), weight_and_gradient(name, *shape)
    before = weight.detach().clone()
    optimizer = record.build({"weight": weight}, RATE, record.options())
    weight.grad = gradient.clone()
    optimizer.step()
    close = {"rtol": 1e-4, "atol": 1e-6} if record.needs else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(weight.detach() - before, record.first_step(gradient, RATE), **close)


@pytest.mark.parametrize("name", NAMES)
def test_its_state_is_as_large_as_the_record_says(name: str) -> None:
    record, (weight, gradient) = OPTIMIZERS.find(name), weight_and_gradient(name, 128, 64)
    optimizer = record.build({"weight": weight}, RATE, record.options())
    weight.grad = gradient
    optimizer.step()
    kept = [t for t in optimizer.state[weight].values() if torch.is_tensor(t) and t.shape == weight.shape]
    assert sum(each.element_size() for each in kept) / weight.element_size() == record.state_floats


@pytest.mark.parametrize("name", NAMES)
def test_every_option_reaches_the_optimizer(name: str) -> None:
    record, (weight, gradient) = OPTIMIZERS.find(name), weight_and_gradient(name, 128, 64)

    def after(**options: float) -> Tensor:
        stepped = torch.nn.Parameter(weight.detach().clone())
        optimizer = record.build({"weight": stepped}, RATE, record.options(**options))
        for scale in (1.0, -0.3, 2.0):
            stepped.grad = gradient * scale + gradient.flip(0)
            optimizer.step()
        return stepped.detach()

    for option in record.options.model_fields:
        assert not torch.equal(after(), after(**{option: 10**6 if option == "min_8bit_size" else 0.5}))


def run(name: str, shape: tuple[int, ...], gradients: Sequence[Tensor], **options: Any) -> Tensor:
    """Return a weight that began at ones, after a step for each gradient."""
    record = OPTIMIZERS.find(name)
    weight = torch.nn.Parameter(torch.ones(shape, dtype=kind_of(name)))
    optimizer = record.build({"weight": weight}, RATE, record.options(**options))
    for gradient in gradients:
        weight.grad = gradient.to(weight)
        optimizer.step()
    return weight.detach().double()


def drawn(shape: tuple[int, ...], count: int = 6) -> list[Tensor]:
    draw = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(count)]


def adamw(gradients: Sequence[Tensor], decay: float) -> Tensor:
    weight, m, v = torch.ones_like(gradients[0]), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        weight = weight - RATE * decay * weight
        weight = weight - RATE * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return weight


def lion(gradients: Sequence[Tensor], decay: float) -> Tensor:
    weight, m = torch.ones_like(gradients[0]), torch.zeros_like(gradients[0])
    for g in gradients:
        weight = weight - RATE * ((0.9 * m + 0.1 * g).sign() + decay * weight)
        m = 0.99 * m + 0.01 * g
    return weight


def adafactor(gradients: Sequence[Tensor], decay: float) -> Tensor:
    weight, rows, columns = torch.ones_like(gradients[0]), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (g * g + 1e-30).mean(1)
        columns = beta * columns + (1 - beta) * (g * g + 1e-30).mean(0)
        u = g / torch.sqrt(rows[:, None] * columns[None, :] / rows.mean())
        u = u / max(1.0, math.sqrt(float((u * u).mean())))
        weight = weight - RATE * decay * weight
        weight = weight - RATE * u
    return weight


def muon(gradients: Sequence[Tensor], decay: float) -> Tensor:
    weight, m = torch.ones_like(gradients[0]), 0.0
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        u, s, v = torch.linalg.svd(0.05 * g + 0.95 * m, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):  # what the iteration does to each singular value
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        weight = weight - RATE * decay * weight - RATE * 0.2 * math.sqrt(max(g.shape)) * (u * s) @ v
    return weight


@pytest.mark.parametrize(
    ("name", "oracle"),
    [("adamw", adamw), ("paged-adamw", adamw), ("lion", lion), ("adafactor", adafactor), ("muon", muon)],
)
@pytest.mark.parametrize("shape", [(5, 3), (2, 9)])
def test_many_steps_follow_the_rule(
    name: str, oracle: Callable[[Sequence[Tensor], float], Tensor], shape: tuple[int, ...]
) -> None:
    gradients = drawn(shape)
    close = {"rtol": 1e-5, "atol": 1e-6} if OPTIMIZERS.find(name).needs else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(run(name, shape, gradients, weight_decay=0.1), oracle(gradients, 0.1), **close)


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw-8bit"])
def test_moments_in_8_bits_are_kept_for_large_tensors_alone_and_step_nearly_as_adamw(name: str) -> None:
    small, large = drawn((5, 3)), drawn((64, 128))
    torch.testing.assert_close(run(name, (5, 3), small), adamw(small, 0.0), rtol=1e-5, atol=1e-6)
    exact = adamw(large, 0.0)
    off = (run(name, (64, 128), large) - exact).norm() / (exact - 1).norm()
    assert 1e-4 < off < 0.1
    as_32_bits = run(name, (64, 128), large, min_8bit_size=10**6)
    torch.testing.assert_close(as_32_bits, exact, rtol=1e-5, atol=1e-6)


def test_muon_leaves_heads_and_vectors_to_adamw() -> None:
    record, gradients = OPTIMIZERS.find("muon"), drawn((4, 3))
    weight = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    optimizer = record.build({"score.modules_to_save.default.weight": weight}, RATE, record.options())
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
        assert weight.grad is gradient
    torch.testing.assert_close(weight.detach(), adamw(gradients, 0.0))
    torch.testing.assert_close(run("muon", (7,), drawn((7,))), adamw(drawn((7,)), 0.0))


def test_muon_agrees_with_torchs_own_but_for_its_rounding_to_bf16() -> None:
    gradients = drawn((6, 4), 3)
    weight = torch.nn.Parameter(torch.ones(6, 4))
    theirs = torch.optim.Muon([weight], lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        weight.grad = gradient.float()
        theirs.step()
    moved = run("muon", (6, 4), gradients) - 1
    assert (moved - (weight.detach().double() - 1)).norm() < 0.03 * moved.norm()


@given(progress=st.floats(0, 1, exclude_max=True), name=st.sampled_from(sorted(SCHEDULES.ours)))
def test_a_schedule_never_leaves_zero_to_one_and_never_rises(progress: float, name: str) -> None:
    factor = SCHEDULES.find(name).factor
    assert factor(0.0) == 1
    assert 0 <= factor(progress) <= 1  # zero only where rounding makes it so
    assert factor(progress) <= factor(progress / 2)
