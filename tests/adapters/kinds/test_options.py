"""PEFT's own options of a kind, under ``[adapter]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedpeft.adapters.kinds import KINDS
from fedpeft.config import AdapterConfig, RunConfig, from_flat, nest, parse_overrides, resolve
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.resident import Resident

Make = Callable[..., RunConfig]


def test_options_reach_peft_from_words_and_travel_to_sites(text_config: Make) -> None:
    config = text_config(adapter__kind="vera", adapter__d_initial="0.25")
    assert config.adapter.options == {"d_initial": 0.25}
    assert from_flat(config.to_flat()) == config
    settings: Any = Resident(config).adapted.peft_config
    assert settings.d_initial == 0.25


def test_lists_are_read_from_words_and_read_back() -> None:
    config = resolve([parse_overrides(["adapter.kind=lora", "adapter.layers_to_transform=0,1"])])
    assert config.adapter.options == {"layers_to_transform": [0, 1]}
    assert from_flat(config.to_flat()) == config


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapter.ranc=4"], "unknown key 'adapter.ranc'.*rank"),
        (["adapter.kind=vera", "adapter.d_inital=1"], "unknown key 'adapter.d_inital'.*d_initial"),
        (["adapter.kind=vera", "adapter.d_initial=much"], "adapter.d_initial = 'much': input should be a valid number"),
        (["adapter.kind=fourierft", "adapter.scaling=nan"], "adapter.scaling = 'nan': input should be a finite number"),
        (
            ["adapter.kind=vera", "adapter.d_initial=-inf"],
            "adapter.d_initial = '-inf': input should be a finite number",
        ),
        (["adapter.lora_alpha=3"], "adapter.lora_alpha = '3': adapter.alpha decides it"),
        (["adapter.r=3"], "adapter.rank decides it"),
        (["adapter.target_modules=query"], "adapter.targets decides it"),
        (["adapter.use_dora=true"], "adapter.kind decides it"),
        (["adapter.kind=vera", "adapter.projection_prng_key=3"], "run.seed decides it"),
        (["adapter.peft_type=LORA"], "unknown key 'adapter.peft_type'"),
        (["adapter.rank_pattern=a"], "adapter.rank_pattern = 'a'"),
        (["adapter.kind=lorra"], "unknown adapter.kind 'lorra'.*lora"),
        (["adapter.init=pisa"], "unknown adapter.init 'pisa'.*pissa"),
    ],
)
def test_what_is_wrong_with_an_option_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        resolve([parse_overrides(words)])
    assert "\n" not in str(caught.value)


def test_naming_another_kind_drops_the_options_of_the_one_before() -> None:
    file = nest({"adapter.kind": "vera", "adapter.d_initial": 0.5, "adapter.rank": 4})
    config = resolve([file, nest({"adapter.kind": "lora"})])
    assert (config.adapter.options, config.adapter.rank) == ({}, 4)
    assert resolve([file, nest({"adapter.dropout": 0.5})]).adapter.options == {"d_initial": 0.5}


def test_a_kind_without_a_rank_says_so_and_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS.ours, "rankless", replace(KINDS.find("miss"), name="rankless", rank=()))
    with pytest.raises(ConfigError, match=r"adapter\.kind = 'rankless' has no rank; drop adapter\.rank"):
        resolve([nest({"adapter.kind": "rankless", "adapter.rank": 4})])
    config = resolve([nest({"adapter.rank": 4}), nest({"adapter.kind": "rankless"})])  # a preset's rank
    assert "rank" not in config.adapter.model_dump()
    assert from_flat(config.to_flat()) == config
    assert AdapterConfig(kind="rankless").scaling > 0


def test_a_kind_without_an_alpha_drops_a_presets_and_refuses_ones_own() -> None:
    config = resolve([nest({"adapter.alpha": 4.0}), nest({"adapter.kind": "miss"})])  # a preset's
    assert "alpha" not in config.adapter.model_dump()
    assert from_flat(config.to_flat()) == config
    for kind in ("miss", "vera", "ia3"):
        with pytest.raises(ConfigError, match=rf"adapter\.kind = '{kind}' has no alpha; drop adapter\.alpha"):
            resolve([nest({"adapter.kind": kind, "adapter.alpha": 4.0})])


def test_what_a_kind_fixes_is_no_option_of_its() -> None:
    for words in (
        ["adapter.kind=supertuning", "adapter.r=4"],
        ["adapter.kind=boft", "adapter.boft_n_butterfly_factor=2"],
    ):
        with pytest.raises(ConfigError, match=r"adapter\.kind decides it"):
            resolve([parse_overrides(words)])
    with pytest.raises(ConfigError, match=r"run\.seed decides it"):
        resolve([parse_overrides(["adapter.kind=fourierft", "adapter.random_loc_seed=777"])])


def test_an_option_that_adds_tensors_to_a_product_is_refused(text_config: Make) -> None:
    with pytest.raises(AdapterError, match=r"'lora': PEFT made a tensor '.*lora_B.*bias' that is no factor"):
        _ = Resident(text_config(adapter__lora_bias=True)).adapted
