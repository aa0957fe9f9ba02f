"""An optimiser and a schedule of another package: one file each, found by entry points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedpeft.config import RunConfig, from_flat
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.resident import Resident
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import with_typed_options
from fedpeft.training.local import Turn, train_locally

Make = Callable[..., RunConfig]

SIGN = """
from pydantic import Field
import torch
from fedpeft.training.optimizers import Optimizer, OptimizerOptions

class Options(OptimizerOptions):
    dampening: float = Field(1.0, gt=0, description="what each step is divided by")

class Sign(torch.optim.Optimizer):
    def __init__(self, parameters, lr, dampening):
        super().__init__(parameters, {"lr": lr, "dampening": dampening})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] / group["dampening"] * parameter.grad.sign()

SIGN = Optimizer(
    "sign", "the gradient's sign", Options,
    lambda parameters, rate, options: Sign(list(parameters.values()), rate, options.dampening),
    first_step=lambda gradient, rate: -rate * gradient.sign(), state_floats=0,
    needs_pairs=True, not_private="it was never looked at",
)
"""
HALVED = """
from fedpeft.training.optimizers import Schedule

HALVED = Schedule("halved", "half the rate in the second half", lambda progress: 0.5 if progress >= 0.5 else 1.0)
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution that names two files of its own."""
    site = tmp_path / "site"
    (site / "sign_steps-1.0.dist-info").mkdir(parents=True)
    (site / "sign_steps-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sign-steps\nVersion: 1.0\n"
    )
    (site / "sign_steps-1.0.dist-info" / "entry_points.txt").write_text(
        "[fedpeft.optimizers]\nsign = sign_steps:SIGN\n[fedpeft.schedules]\nhalved = halved_rate:HALVED\n"
    )
    (site / "sign_steps.py").write_text(SIGN)
    (site / "halved_rate.py").write_text(HALVED)
    monkeypatch.syspath_prepend(str(site))


def test_another_packages_optimizer_and_schedule_train_a_run(plugged: None, text_config: Make, tmp_path: Path) -> None:
    settings = {"train__optimizer": "sign", "train__lr_schedule": "halved", "train__learning_rate": 1e-3}
    moved = {}
    for dampening in (1.0, 4.0):
        config = text_config(
            **settings,
            train__dampening=dampening,
            train__local_steps=1,
            federation__rounds=1,
            strategy__name="fedit",
            simulation__workers=0,
        )
        assert from_flat(config.to_flat()).train.options.dampening == dampening
        outcome = simulate(config, tmp_path / f"run-{dampening}")
        assert outcome.error is None
        rounds = [json.loads(line) for line in (outcome.path / "metrics.jsonl").read_text().splitlines()]
        assert any(event["event"] == "round" for event in rounds)
        tensors = load_file(outcome.path / "adapter" / "adapter_model.safetensors")
        moved[dampening] = max(float(t.abs().max()) for name, t in tensors.items() if "lora_B" in name)
    assert 0 < moved[1.0] <= 1.001e-3  # B began at zero, and each client made one signed step
    assert moved[4.0] == pytest.approx(moved[1.0] / 4)


def test_its_options_are_checked_and_belong_to_it_alone(plugged: None, text_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"train.dampening = '-1': input should be greater than 0"):
        text_config(train__optimizer="sign", train__dampening="-1")
    with pytest.raises(ConfigError, match=r"train.dampening = 2.0 belongs to train.optimizer = 'sign', not 'adamw'"):
        text_config(train__dampening=2)
    with pytest.raises(ConfigError, match=r"unknown key 'train.dampning'. Did you mean 'dampening'\?"):
        text_config(train__optimizer="sign", train__dampning=2)


def test_an_optimizer_of_pairs_is_refused_where_one_factor_is_frozen(
    plugged: None, text_config: Make, tmp_path: Path
) -> None:
    config = text_config(
        train__optimizer="sign", adapter__kind="ffa-lora", strategy__name="fedit", simulation__workers=0
    )
    home = Resident(config)
    with pytest.raises(AdapterError, match="steps both factors of a layer together"):
        train_locally(home.adapted, home.data.train, home.partition.indices[0], config.train, Turn(0, "0", 1, 1))


def test_an_optimizer_that_says_so_is_refused_where_rows_are_private(plugged: None, text_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"is not for privacy.level = 'record': it was never looked at"):
        with_typed_options(text_config(train__optimizer="sign", privacy__level="record", privacy__epsilon=3))


def test_names_that_are_not_there_are_refused_with_the_nearest(text_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"unknown train.optimizer 'adam'. Did you mean 'adamw'\?"):
        text_config(train__optimizer="adam")
    with pytest.raises(ConfigError, match=r"unknown train.lr_schedule 'cos'. Did you mean 'cosine'\?"):
        text_config(train__lr_schedule="cos")
    with pytest.raises(ConfigError, match=r"unknown train.optimizer 'sign'"):
        text_config(train__optimizer="sign")  # which another package would have to bring
