from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedpeft.config import RunConfig, TrainConfig, from_flat, nest, resolve
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.training.batched.together import why_not
from fedpeft.training.optimizers import OPTIMIZERS
from fedpeft.training.steps import (
    RATIO,
    Additions,
    learning_rate,
    make_optimizer,
    regulariser,
    set_rate,
    take_step,
    warmup_steps,
)

Make = Callable[..., RunConfig]
A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "score.weight"


def rates(train: TrainConfig, rounds: int, steps: int) -> list[float]:
    return [
        learning_rate(train, server_round, rounds, step=step, steps=steps)
        for server_round in range(1, rounds + 1)
        for step in range(steps)
    ]


def theirs(make: Callable[..., Any], total: int, warmup: int, **settings: float) -> list[float]:
    """Return the rates of a schedule of transformers whose peak is 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make(optimizer, num_warmup_steps=warmup, num_training_steps=total, **settings)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("warmup", "rising"), [(0, 0), (5, 5), (0.25, 5), (0.21, 5)])
@pytest.mark.parametrize(
    ("ours", "make", "settings"),
    [
        ({"lr_schedule": "linear"}, transformers.get_linear_schedule_with_warmup, {}),
        ({"lr_schedule": "cosine"}, transformers.get_cosine_schedule_with_warmup, {}),
        (
            {"lr_schedule": "cosine", "min_learning_rate": 0.3},
            transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup,
            {"min_lr": 0.3},
        ),
    ],
)
def test_schedules_are_transformers_but_that_warm_up_begins_above_zero(
    ours: dict[str, Any], make: Callable[..., Any], settings: dict[str, float], warmup: float, rising: int
) -> None:
    found = rates(TrainConfig(learning_rate=2.0, warmup=warmup, **ours), 4, 5)
    expected = theirs(make, 20, rising, **settings)
    assert warmup_steps(warmup, 20) == rising
    assert found[rising:] == pytest.approx(expected[rising:])
    assert found[:rising] == pytest.approx([rate + 2.0 / rising for rate in expected[:rising]])
    assert all(rate > 0 for rate in found)


def test_a_constant_rate_warms_up_too_and_all_of_a_run_may_be_warm_up() -> None:
    assert rates(TrainConfig(learning_rate=2.0, warmup=2), 2, 2) == [1.0, 2.0, 2.0, 2.0]
    assert rates(TrainConfig(learning_rate=2.0, warmup=8), 2, 2) == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_by_round_is_flowertunes() -> None:
    train = TrainConfig(learning_rate=5e-5, min_learning_rate=1e-6, lr_schedule="cosine-by-round")

    def cosine_annealing(current_round: int, total_round: int) -> float:
        return 1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + math.cos(math.pi * current_round / total_round))

    expected = [cosine_annealing(current, 7) for current in range(1, 8) for _ in range(3)]
    assert rates(train, 7, 3) == pytest.approx(expected, rel=1e-12)


def test_rates_that_fit_no_schedule_are_refused() -> None:
    for settings, words in (
        ({"warmup": 1.5}, "a share below 1, or a whole number of steps"),
        ({"learning_rate": 1e-3, "min_learning_rate": 1e-2, "lr_schedule": "linear"}, "is above train.learning_rate"),
        ({"min_learning_rate": 1e-4}, "'constant' never falls; allowed with it: .*cosine"),
        ({"lr_schedule": "cosine-by-round"}, "at its minimum in the last round.*set train.min_learning_rate"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainConfig(**settings)


def parameters() -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(5)
    shapes = {A: (2, 6), B: (5, 2), HEAD: (3, 5)}
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def stepped(ratio: float, **settings: Any) -> dict[str, Tensor]:
    held, draw = parameters(), torch.Generator().manual_seed(6)
    optimizer = make_optimizer(TrainConfig(lora_plus_ratio=ratio, learning_rate=0.01, **settings), held)
    for _ in range(3):
        set_rate(optimizer, 0.01)
        for parameter in held.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    assert [id(each) for group in optimizer.param_groups for each in group["params"]] == [id(p) for p in held.values()]
    return {name: parameter.detach() for name, parameter in held.items()}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.ours))
def test_lora_plus_steps_b_alone_by_its_own_rate_under_every_optimizer(name: str) -> None:
    plain, apart = (stepped(ratio, optimizer=name) for ratio in (1.0, 16.0))
    assert torch.equal(plain[A], apart[A])
    assert torch.equal(plain[HEAD], apart[HEAD])
    start = parameters()[B].detach()
    torch.testing.assert_close(16 * (plain[B] - start), apart[B] - start, rtol=1e-4, atol=1e-5)


def test_a_ratio_of_one_leaves_the_optimizer_as_it_is() -> None:
    optimizer = make_optimizer(TrainConfig(lora_plus_ratio=1.0), parameters())
    assert len(optimizer.param_groups) == 1
    assert RATIO not in optimizer.param_groups[0]


def test_lora_plus_without_factors_b_is_refused() -> None:
    held = parameters()
    with pytest.raises(AdapterError, match="here none is trained"):
        make_optimizer(TrainConfig(lora_plus_ratio=4), {HEAD: held[HEAD]})


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"needs bitsandbytes.*pip install 'fedpeft\[quantization\]'"):
        make_optimizer(TrainConfig(optimizer="adamw-8bit"), parameters())


def test_a_correction_is_added_to_each_gradient_after_clipping() -> None:
    held = parameters()
    gradients = {name: torch.full_like(parameter, 2.0) for name, parameter in held.items()}
    control = {A: torch.full((2, 6), 7.0)}
    regularise = regulariser(TrainConfig(max_grad_norm=1e-3), held, Additions(correction=control))
    for name, parameter in held.items():
        parameter.grad = gradients[name].clone()
    regularise()
    norm = math.sqrt(sum(float(each.square().sum()) for each in gradients.values()))
    for name, parameter in held.items():
        expected = gradients[name] * 1e-3 / norm + (7.0 if name == A else 0.0)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_step_that_overflows_is_computed_again_at_half_the_scale() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer, scaler, scales = torch.optim.SGD([weight], lr=0.5), torch.amp.GradScaler("cpu", init_scale=2.0**18), []

    def compute() -> str:
        scales.append(scaler.get_scale())
        loss = (weight * torch.tensor([1.0, 2.0, 3.0])).sum()
        scaler.scale(loss).backward()
        assert weight.grad is not None
        weight.grad = weight.grad.half().float()  # which holds 65504 at most
        return "done"

    assert take_step(optimizer, compute, lambda: None, scaler) == "done"
    assert scales == [2.0**18, 2.0**17, 2.0**16, 2.0**15, 2.0**14][: len(scales)]
    assert scales[-1] * 3 <= 65504 < scales[-2] * 3
    torch.testing.assert_close(weight.detach(), torch.tensor([0.5, 0.0, -0.5]))


def test_a_gradient_that_overflows_at_any_scale_moves_nothing_and_ends() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.5), torch.amp.GradScaler("cpu", init_scale=4.0)

    def compute() -> None:
        scaler.scale((weight * math.inf).sum()).backward()

    take_step(optimizer, compute, lambda: None, scaler)
    assert torch.equal(weight.detach(), torch.ones(3))


def test_what_each_client_does_by_itself_is_not_done_for_many_together() -> None:
    layers: Any = SimpleNamespace(refusal="")
    for settings in ({"accumulation": 2}, {"neftune_alpha": 5.0}, {"precision": "fp16"}, {"optimizer": "muon"}):
        assert next(iter(settings)) in why_not(None, layers, TrainConfig(**settings))  # type: ignore[arg-type]


def test_fp16_is_refused_without_a_gpu_and_under_record_level_privacy(text_config: Make) -> None:
    from fedpeft.resident import Resident
    from fedpeft.strategies import with_typed_options

    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"'fp16' is for GPUs, and there is none here. Allowed on a CPU: fp32"):
            _ = Resident(text_config(train__precision="fp16")).adapted
    with pytest.raises(ConfigError, match=r"is not for privacy.level = 'record'"):
        with_typed_options(text_config(privacy__level="record", privacy__epsilon=3, train__precision="fp16"))


@pytest.mark.parametrize(
    ("settings", "norm"),
    [
        ({"model.task": "causal-lm"}, 1.0),
        ({"data.completion": "completion"}, 1.0),  # from which the task follows
        ({"model.task": "causal-lm", "train.max_grad_norm": 0.0}, 0.0),
        ({"model.task": "causal-lm", "train.max_grad_norm": 0.3}, 0.3),
        ({"model.task": "causal-lm", "privacy.level": "record", "privacy.epsilon": 3.0}, 0.0),
        ({"model.task": "causal-lm", "privacy.level": "client", "privacy.epsilon": 3.0}, 1.0),
        ({"model.task": "causal-lm", "strategy.name": "scaffold"}, 1.0),
        ({"model.task": "causal-lm", "train.proximal_mu": 0.1}, 1.0),
        ({"model.task": "sequence-classification"}, 0.0),
        ({"model.task": "image-classification"}, 0.0),
    ],
)
def test_whole_gradients_of_language_models_are_clipped_at_one_unless_somebody_says_or_rows_are(
    settings: dict[str, object], norm: float
) -> None:
    from fedpeft.strategies import with_typed_options

    config = with_typed_options(resolve([nest({"strategy.name": "fedit", **settings})]))
    assert config.train.max_grad_norm == norm
    assert with_typed_options(from_flat(config.to_flat())) == config  # as a run that goes on reads it
