"""The audit from inside: on mechanisms whose mu is known, and on a model whose rows are mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from fedpeft.cli.privacy import privacy_app
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import FedpeftError, PrivacyError
from fedpeft.models import torch_seed
from fedpeft.privacy import independence
from fedpeft.privacy.dp_sgd import RowGradients
from fedpeft.privacy.white_box import audit_steps, mu_lower_bound
from fedpeft.resident import Resident


@pytest.mark.parametrize("mu", [0.2, 1.0, 2.5])
def test_the_bound_is_above_the_true_mu_in_at_most_one_audit_of_twenty(mu: float) -> None:
    rng = np.random.default_rng(0)
    error = norm.cdf(-mu / 2)
    bounds = [mu_lower_bound(*rng.binomial(500, error, 2), 500) for _ in range(400)]
    assert sum(bound > mu for bound in bounds) <= 20
    assert np.median(bounds) > mu - 0.4


def test_errors_of_both_kinds_at_random_show_nothing() -> None:
    assert mu_lower_bound(500, 500, 1000) == mu_lower_bound(1000, 0, 1000) == 0.0


@pytest.fixture(scope="module")
def mixing_config(tmp_path_factory: pytest.TempPathFactory, text_csv: Path, tiny_bert: Path) -> RunConfig:
    """Return a run of DeBERTa with keys shared between tokens and positions, whose weights differ enough to matter."""
    import transformers

    folder = tmp_path_factory.mktemp("deberta")
    with torch_seed(3):
        config = transformers.DebertaV2Config(
            vocab_size=63,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=64,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            initializer_range=0.5,
            num_labels=2,
        )
        transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    settings = {
        "model.name": str(folder),
        "data.source": str(text_csv),
        "data.max_length": 32,
        "federation.clients": 2,
        "adapter.rank": 2,
        "adapter.targets": ["query_proj", "key_proj"],
        "adapter.head": "frozen",
        "train.batch_size": 4,
        "train.local_steps": 2,
        "privacy.level": "record",
        "privacy.noise_multiplier": 1.0,
        "privacy.rng": "seeded",
    }
    return resolve([nest(settings)])


def test_rows_that_are_mixed_are_found_if_no_check_refuses_them_and_sound_rows_are_not_accused(
    mixing_config: RunConfig, text_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PrivacyError, match="query_proj"):
        audit_steps(Resident(mixing_config), mixing_config, pairs=1, draws=10)
    sound = text_config(
        privacy__level="record", privacy__noise_multiplier=1.0, privacy__max_grad_norm=0.05, privacy__rng="seeded"
    )
    told, _, charge = audit_steps(Resident(sound), sound, pairs=8, draws=400)
    assert 1 / charge.noise_multiplier == 1.0
    assert told.sensitivity == pytest.approx(1.0, abs=1e-3)  # a whole clipped row, and no more
    assert 0.6 < told.mu <= 1.0

    monkeypatch.setattr(independence, "prove_independence", lambda home, engine: None)
    monkeypatch.setattr(RowGradients, "_strange", lambda self, *tensors: None)
    told, _, _ = audit_steps(Resident(mixing_config), mixing_config, pairs=24, draws=400)
    assert told.sensitivity > 1.3
    assert told.mu > 1.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_config: Callable[..., RunConfig]) -> Path:
    """Return what the audit reads of a run."""
    path = tmp_path_factory.mktemp("runs") / "run"
    path.mkdir()
    config = text_config(privacy__level="record", privacy__epsilon=3.0, privacy__max_grad_norm=0.05)
    (path / "config.toml").write_text(config.to_toml())
    (path / "privacy.json").write_text(json.dumps({"level": "record", "epsilon_max": 3.0}))
    return path


def command(*words: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(privacy_app, ["audit", *map(str, words)])
    if isinstance(result.exception, FedpeftError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_shows_claim_and_bound(run: Path) -> None:
    code, text = command(run, "--white-box", "--draws", 200, "--json")
    facts: dict[str, Any] = json.loads(text)
    assert code == 0
    assert facts["claimed_mu"] == pytest.approx(1 / facts["noise_multiplier"])
    assert facts["mu_lower_bound"] <= facts["claimed_mu"]
    assert facts["step_epsilon_lower_bound"] <= facts["claimed_step_epsilon"]
    assert facts["epsilon_lower_bound"] <= facts["planned_epsilon"] <= 3.0
    assert (facts["claimed_epsilon"], facts["draws"], facts["violated"]) == (3.0, 200, False)
    code, text = command(run, "--white-box", "--draws", 50)
    assert code == 0
    assert "a step's mu is at least" in text


def test_noise_that_is_missing_is_called_broken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpeft.privacy import white_box

    weak = lambda source: type("Weak", (), {"normal": lambda self, shape: source().normal(shape) * 0.3})()  # noqa: E731
    secure = white_box.secure
    monkeypatch.setattr(white_box, "secure", lambda: weak(secure))
    code, text = command(run, "--white-box", "--draws", 200)
    assert code == 1
    assert "BROKEN" in text


def test_what_cannot_be_audited_is_refused(run: Path, tmp_path: Path, text_config: Callable[..., RunConfig]) -> None:
    assert command(run, "--white-box", "--guesses", 10)[0] == 2
    assert command(run, "--draws", 10)[0] == 2
    assert "too few" in command(run, "--white-box", "--draws", 1)[1]
    for settings, what in (
        ({"privacy__level": "client", "privacy__epsilon": 3.0}, "level = 'client'"),
        ({}, "level = 'none'"),
        ({"privacy__level": "record", "privacy__noise_multiplier": 0.0}, "adds no noise"),
    ):
        (tmp_path / "config.toml").write_text(text_config(**settings).to_toml())
        code, text = command(tmp_path, "--white-box")
        assert (code, what in text) == (2, True), text
