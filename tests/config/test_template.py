"""The commented file that `fedpeft config` prints."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fedpeft.config import RunConfig, configure, read_toml, resolve
from fedpeft.config.template import commented, keys
from fedpeft.presets import PRESETS
from fedpeft.strategies import find, with_typed_options
from fedpeft.training.optimizers import OPTIMIZERS

WORDS = {
    "a method with options": {"strategy.name": "lora-lego", "strategy.rank": 4},
    "an adapter that the method chooses": {"strategy.name": "fed-sb"},
    "an optimizer with options": {"train.optimizer": "sgd", "train.momentum": 0.9},
    "a kind without a rank, and its options": {
        "strategy.name": "fedit",
        "adapter.kind": "fourierft",
        "adapter.n_frequency": 100,
        "adapter.layers_to_transform": [0, 1],
    },
    "lists and texts": {"adapter.targets": ["query", "value"], "data.labels": '"a, b", "c"', "data.domain": "wörds"},
    "privacy": {"privacy.level": "record", "privacy.epsilon": 3.0},
}


def written(config: RunConfig) -> str:
    return commented(config, find(config.strategy.name).parse_options(config.strategy.options))


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("words", [None, *WORDS])
def test_what_is_printed_resolves_to_the_same(preset: str | None, words: str | None, tmp_path: Path) -> None:
    config = configure(WORDS[words] if words else {}, preset=preset)
    file = tmp_path / "my.toml"
    file.write_text(written(config), encoding="utf-8")
    again = resolve([read_toml(file)])
    assert again == config
    if preset is not None and words != "an adapter that the method chooses":
        assert with_typed_options(again) == with_typed_options(config)


def test_every_key_stands_there_with_its_default_and_its_meaning() -> None:
    text = written(RunConfig())
    assert not any(tomllib.loads(text).values())  # nothing is set
    section = ""
    seen = set()
    for line in text.splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        if line.startswith("#") and not line.startswith("# "):
            seen.add(f"{section}.{line[1:].partition(' =')[0]}")
    options = find("lora-fair").Options.model_fields
    of_others = {f"train.{key}" for each in OPTIMIZERS.all().values() for key in each.options.model_fields}
    of_others -= {f"train.{key}" for key in OPTIMIZERS.find("adamw").options.model_fields}
    assert seen == {*keys(), *(f"strategy.{name}" for name in options)} - of_others
    assert "# step size (number > 0)\n#learning_rate = 0.001\n" in text
    assert re.search(r"\(sgd \| adamw \|[^)]*\)\n#optimizer", text)


def test_each_default_can_be_taken_as_it_is() -> None:
    lines = written(RunConfig()).splitlines()
    taken = [
        line[1:] if line.startswith("#") and not line.endswith("=") and line[1:2] != " " else line for line in lines
    ]
    assert resolve([tomllib.loads("\n".join(taken))]).model_dump() == {
        **RunConfig().model_dump(),
        "strategy": {"name": "lora-fair", **find("lora-fair").parse_options({}).model_dump()},
    }
