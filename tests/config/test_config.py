from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import RunConfig, from_flat, merge, nest, parse_overrides, read_toml, resolve
from fedpeft.errors import ConfigError


def _resolve(*words: str) -> RunConfig:
    return resolve([parse_overrides(words)])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trian.batch_size=1", "unknown section 'trian'. Did you mean 'train'?"),
        ("train.learning_rte=1", "unknown key 'train.learning_rte'. Did you mean 'learning_rate'?"),
        ("train.learning_rate=nan", "train.learning_rate = 'nan': input should be a finite number"),
        ("train.learning_rate=-1", "train.learning_rate = '-1': input should be greater than 0"),
        ("adapter.rank=2.5", "adapter.rank = '2.5'"),
        ("adapter.rank=0", "adapter.rank = '0': input should be greater than or equal to 1"),
        ("adapter.kind=dorra", "unknown adapter.kind 'dorra'. Did you mean 'dora'?"),
        ("federation.fraction=1.5", "federation.fraction"),
        ("partition.scheme=natural", "needs partition.by"),
        ("data.labels=a", "must name two or more different labels"),
        ("data.labels=a,b,a", "must name two or more different labels"),
        ("train.momentum=0.9", "belongs to train.optimizer = 'sgd'"),
        ("nonsense", "neither a .toml file nor section.key=value"),
        ("rounds=3", "not of the form section.key"),
    ],
)
def test_a_bad_word_is_one_line_that_names_it(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _resolve(word)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_later_layers_win_key_by_key() -> None:
    config = resolve(
        [nest({"train.batch_size": 4, "train.learning_rate": 0.5}), parse_overrides(["train.batch_size=9"])]
    )
    assert (config.train.batch_size, config.train.learning_rate) == (9, 0.5)


def test_naming_epochs_takes_back_an_earlier_layers_steps() -> None:
    config = resolve([nest({"train.local_steps": 4}), parse_overrides(["train.local_epochs=2"])])
    assert (config.train.local_steps, config.train.local_epochs) == (None, 2)


def test_steps_and_epochs_in_one_layer_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        _resolve("train.local_steps=1", "train.local_epochs=1")


def test_naming_a_client_column_replaces_an_earlier_layers_scheme() -> None:
    config = resolve([nest({"partition.scheme": "dirichlet"}), parse_overrides(["partition.by=site"])])
    assert config.partition.scheme == "natural"
    with pytest.raises(ConfigError, match="implies"):
        _resolve("partition.by=site", "partition.scheme=iid")


def test_naming_another_strategy_drops_the_options_of_the_first() -> None:
    first = nest({"strategy.name": "lora-lego", "strategy.rank": 4})
    assert merge([first, nest({"strategy.name": "fedit"})])["strategy"] == {"name": "fedit"}
    assert merge([nest({"strategy.rank": 4}), nest({"strategy.name": "fedit"})])["strategy"] == {
        "rank": 4,
        "name": "fedit",
    }
    assert merge([first, nest({"strategy.name": "lora-lego"})])["strategy"] == {"name": "lora-lego", "rank": 4}


def test_an_optimizers_options_are_typed_and_its_defaults_filled_in() -> None:
    train = _resolve("train.optimizer=sgd", "train.momentum=0.5").train
    assert train.model_dump().items() >= {"momentum": 0.5, "weight_decay": 0.0}.items()
    with pytest.raises(ConfigError, match=r"train.momentum = '2': input should be less than 1"):
        _resolve("train.optimizer=sgd", "train.momentum=2")


def test_files_of_earlier_versions_may_name_another_optimizers_default() -> None:
    train = _resolve("train.optimizer=adamw", "train.momentum=0.0").train
    assert "momentum" not in train.model_dump()


def test_labels_may_hold_quoted_commas() -> None:
    assert _resolve('data.labels="a, b", c').data.label_names == ("a, b", "c")


@given(
    rate=st.floats(1e-12, 1e3),
    rank=st.integers(1, 512),
    targets=st.lists(st.sampled_from(["query", "value", "q_proj"]), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 2**63 - 1),
)
def test_what_travels_or_is_saved_reads_back_the_same(
    rate: float, rank: int, targets: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = resolve(
        [nest({"train.learning_rate": rate, "adapter.rank": rank, "adapter.targets": targets, "run.seed": seed})]
    )
    assert from_flat(config.to_flat()) == config
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(config.to_toml())
    assert resolve([read_toml(path)]) == config


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    with pytest.raises(ConfigError, match="no configuration file"):
        read_toml(path)
    path.write_text("[train\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(path)
    path.write_text("rounds = 3\n")
    with pytest.raises(ConfigError, match="outside a section"):
        read_toml(path)
