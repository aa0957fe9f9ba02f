"""What is refused before a private run begins, and how it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.adapters.kinds import KINDS
from fedpeft.config import RunConfig, from_flat
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.errors import ConfigError
from fedpeft.strategies import with_typed_options

Make = Callable[..., RunConfig]
RECORD = {"privacy__level": "record", "privacy__epsilon": 3.0}
CLIENT = {"privacy__level": "client", "privacy__epsilon": 3.0, "strategy__name": "fedit"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy__epsilon": 3.0}, "privacy.epsilon = 3.0 does nothing with privacy.level = 'none'"),
        ({"privacy__level": "record"}, "needs privacy.epsilon"),
        ({**RECORD, "privacy__cohort": "fixed"}, "with privacy.level = 'record'; give privacy.level=client"),
        ({**CLIENT, "privacy__max_grad_norm": 2.0}, "give privacy.level=record"),
        ({**RECORD, "privacy__sample_rate": 0.1}, "goes with privacy.public_counts = false"),
        ({**RECORD, "privacy__public_counts": False}, "needs privacy.sample_rate"),
        ({**CLIENT, "privacy__canaries": 5}, "protects whole clients"),
        ({**RECORD, "privacy__delta": 1.0}, "privacy.delta"),
        ({**RECORD, "privacy__accountant": "gdp"}, "privacy.accountant"),  # it underestimates
    ],
)
def test_settings_that_contradict_each_other_are_one_clear_error(
    settings: dict[str, Any], words: str, text_config: Make
) -> None:
    with pytest.raises(ConfigError, match=words):
        text_config(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train__max_grad_norm": 1.0}, "set privacy.max_grad_norm"),
        ({"run__evaluate_clients": True}, "run.evaluate_clients"),
        ({"adapter__init": "eva", "adapter__init_data": "rows.csv"}, "privacy.public_init_data=true"),
        (
            {
                "privacy__public_counts": False,
                "privacy__sample_rate": 0.1,
                "train__local_steps": None,
                "train__local_epochs": 1,
            },
            "needs train.local_steps",
        ),
    ],
)
def test_leaks_around_the_mechanism_are_refused(settings: dict[str, Any], words: str, text_config: Make) -> None:
    with pytest.raises(ConfigError, match=words):
        with_typed_options(text_config(**RECORD, **settings))


@pytest.mark.parametrize("kind", sorted(KINDS.ours))
def test_kinds_without_gradients_of_single_rows_are_refused_by_name(kind: str, text_config: Make) -> None:
    strategy = "fed-sb" if KINDS.find(kind).update == "square" else "fedit"
    rows = {"adapter__init_data": "r.csv", "privacy__public_init_data": True} if kind == "lora-sb" else {}
    config = text_config(**RECORD, adapter__kind=kind, strategy__name=strategy, **rows)
    if kind in {"lora", "rslora", "ffa-lora", "lora-xs", "lora-sb"}:
        assert with_typed_options(config).privacy.rng == "seeded"
        assert with_typed_options(config, rng="secure").privacy.rng == "secure"
        return
    with pytest.raises(ConfigError, match=f"adapter.kind = '{kind}' is not for privacy.level = 'record'"):
        with_typed_options(config)


def test_public_rows_may_initialise_and_a_plain_run_has_no_randomness_to_name(text_config: Make) -> None:
    config = text_config(**RECORD, adapter__init="eva", adapter__init_data="r.csv", privacy__public_init_data=True)
    assert with_typed_options(config).adapter.init == "eva"
    assert with_typed_options(text_config()).privacy == PrivacyConfig()


def test_what_a_private_run_was_resolved_to_is_read_back_as_it_was(text_config: Make) -> None:
    config = with_typed_options(text_config(**RECORD, privacy__spare_rounds=2))
    assert from_flat(config.to_flat()) == config


def test_the_documentation_lists_every_setting_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    for name, field in PrivacyConfig.model_fields.items():
        assert f"| `{name}` |" in text
        assert f"| {field.description} |" in text, name
