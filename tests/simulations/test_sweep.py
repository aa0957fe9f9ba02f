"""Sweeps: what is run at which budget, and that an epsilon shown is one that a run states."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.errors import ConfigError, PrivacyError
from fedpeft.privacy.statement import PRIVACY, read_statement
from fedpeft.simulations.jobs import Job
from fedpeft.simulations.running import run_jobs
from fedpeft.simulations.sweep import (
    Point,
    plan_sweep,
    private_words,
    split_adapters,
    split_epsilons,
    split_strategies,
    sweep_points,
    write_sweep,
)


def jobs_of(config: RunConfig, adapters: str, strategies: str, epsilons: str, out: Path, seeds: int = 1) -> list[Job]:
    points = sweep_points(
        split_adapters(adapters), split_strategies(strategies), split_epsilons(epsilons), config.privacy
    )
    return plan_sweep(points, config, seeds, out)


def private(text_config: Any, **settings: object) -> RunConfig:
    known: dict[str, object] = {"privacy__level": "record", "privacy__epsilon": 8.0, "federation__rounds": 1}
    config: RunConfig = text_config(**(known | settings))
    return config


def test_what_is_asked_for_is_told_apart() -> None:
    assert split_epsilons("1, 3.5,inf") == [1.0, 3.5, math.inf]
    assert split_strategies("fedit:server_optimizer=adam,server_tau=0.1,local") == [
        "fedit:server_optimizer=adam,server_tau=0.1",
        "local",
    ]
    words = private_words(["my.toml", "privacy.max_grad_norm=0.5"], [math.inf, 3.0, 1.0], delta=1e-6)
    assert words[2:] == ["privacy.level=record", "privacy.epsilon=1.0", "privacy.delta=1e-06"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,x", "'x' in --epsilons is no epsilon"),
        ("0", "'0' in --epsilons"),
        ("-1,inf", "'-1' in --epsilons"),
        ("nan", "'nan' in --epsilons"),
        ("3,3.0", "twice"),
        ("inf", "without privacy alone"),
        (",", "names nothing"),
    ],
)
def test_epsilons_are_positive_numbers_or_infinity_beside_one(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        split_epsilons(text)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("privacy.epsilon=3", "that is --epsilons"),
        ("privacy.level=client", "that is --level"),
        ("strategy.name=fedit", "that is --strategies"),
        ("adapter.kind=ffa-lora", "that is --adapters"),
        ("privacy.noise_multiplier=1", "fixes the noise"),
        ("strategy.solver=cosine", "options belong to one method"),
    ],
)
def test_what_a_sweep_sets_is_set_in_one_place(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        private_words([word], [3.0])


def test_every_combination_is_a_row_and_infinity_trains_without_privacy() -> None:
    privacy = PrivacyConfig(level="record", epsilon=1.0, max_grad_norm=0.5, delta=1e-6)
    points = sweep_points(["lora", "ffa-lora"], ["fedit", "lora-fair:solver=cosine"], [1.0, 3.0, math.inf], privacy)
    assert len(points) == len({point.label for point in points}) == 12
    plain = [point for point in points if point.budget == math.inf]
    assert {json.dumps(point.settings["privacy"]) for point in plain} == {'{"level": "none", "delta": 1e-06}'}
    (chosen,) = [point for point in points if point.label == "ffa-lora_lora-fair:solver=cosine_epsilon=3"]
    assert chosen.settings == {
        "strategy": {"solver": "cosine"},
        "adapter": {"kind": "ffa-lora"},
        "privacy": {"level": "record", "epsilon": 3.0, "max_grad_norm": 0.5, "delta": 1e-6},
    }
    # the private runs of one adapter share a model, and stand together
    alike = [(point.adapter, point.budget == math.inf) for point in points]
    assert len([1 for one, other in itertools.pairwise(alike) if one != other]) == 3


@pytest.mark.parametrize(
    ("adapters", "strategies", "settings", "says"),
    [
        ("lora,ffa-lora", "rolora", {}, "rolora"),
        ("lora,dora", "fedit", {}, "adapter.kind = 'dora' is not for privacy.level = 'record'"),
        ("lora", "fedti", {}, "Did you mean 'fedit'"),
        ("lora,lora", "fedit", {}, "twice"),
        ("lora", "fedit:privacy.max_grad_norm=1", {}, "sets itself"),
        ("lora", "fedit:adapter.kind=ffa-lora", {}, "sets itself"),
        ("lora", "fedit", {"privacy__noise_multiplier": 1.0}, "fixes the noise"),
        ("lora", "lora-fair", {"privacy__level": "client"}, "is not for privacy.level = 'client'"),
    ],
)
def test_what_is_refused_is_refused_before_anything_runs(
    adapters: str, strategies: str, settings: dict[str, object], says: str, text_config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        jobs_of(private(text_config, **settings), adapters, strategies, "3,inf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_no_noise_meets_is_refused_before_anything_runs(text_config: Any, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="noise multiplier"):
        jobs_of(private(text_config), "lora", "fedit", "3,1e-9", tmp_path / "out")


def test_a_sweep_shows_what_its_runs_state_and_goes_on_where_it_was(text_config: Any, tmp_path: Path) -> None:
    config = private(text_config, privacy__max_grad_norm=0.5)
    jobs = jobs_of(config, "lora", "fedit", "8,inf", tmp_path, seeds=2)
    assert [(job.seed, job.config.privacy.level) for job in jobs] == [
        (0, "none"),
        (0, "record"),
        (1, "none"),
        (1, "record"),
    ]
    compared = run_jobs(jobs, config, tell=lambda line: None)
    assert not compared.failed
    facts = write_sweep(jobs, compared, tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text()) == facts
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    ((private_point, plain_point),) = [line["points"] for line in facts["lines"]]
    stated = [read_statement(job.path) for job in jobs]
    assert [statement is None for statement in stated] == [True, False, True, False]
    claims = [statement["epsilon_max"] for statement in stated if statement is not None]
    assert private_point["epsilon_max"] == max(claims) <= 8
    assert (private_point["runs"], plain_point["budget"], plain_point["epsilon_max"]) == (2, None, None)
    assert "± " in (tmp_path / "sweep.md").read_text()
    # the figure is the run's own word, and nothing else
    file = jobs[1].path / PRIVACY
    file.write_text(json.dumps({**json.loads(file.read_text()), "epsilon_max": 9.87}))
    told: list[str] = []
    again = run_jobs(jobs, config, tell=told.append)
    assert all(line.endswith("done before") for line in told)
    assert write_sweep(jobs, again, tmp_path)["lines"][0]["points"][0]["epsilon_max"] == 9.87
    assert "epsilon 9.870" in told[1]


def test_clients_can_be_swept_too(text_config: Any, tmp_path: Path) -> None:
    config = private(text_config, privacy__level="client")
    jobs = jobs_of(config, "ffa-lora", "fedit", "8", tmp_path)
    assert all(isinstance(job.row, Point) for job in jobs)
    facts = write_sweep(jobs, run_jobs(jobs, config, tell=lambda line: None), tmp_path)
    assert 0 < facts["lines"][0]["points"][0]["epsilon_max"] <= 8
    assert any("level client" in note for note in facts["notes"])
