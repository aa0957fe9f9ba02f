from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, CLIPConfig, DistilBertConfig, GPT2Config, LlamaConfig, Wav2Vec2Config

from fedpeft.config import RunConfig
from fedpeft.dropout import configure_dropout, has_dropout, set_dropout
from fedpeft.errors import ConfigError
from fedpeft.resident import Resident
from fedpeft.training.local import Turn, train_locally

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("kind", [BertConfig, DistilBertConfig, GPT2Config, LlamaConfig])
def test_every_probability_of_a_configuration_is_set(kind: Any) -> None:
    config = kind()
    configure_dropout(config, 0.25)
    named = {name: value for name, value in vars(config).items() if "drop" in name and isinstance(value, float)}
    assert named
    assert set(named.values()) == {0.25}


def test_parts_of_a_configuration_count_and_whole_layers_are_never_dropped() -> None:
    clip, wave = CLIPConfig(), Wav2Vec2Config(layerdrop=0.1)
    configure_dropout(clip, 0.25)
    configure_dropout(wave, 0.25)
    assert clip.text_config.attention_dropout == clip.vision_config.attention_dropout == 0.25
    assert (wave.layerdrop, wave.hidden_dropout) == (0.0, 0.25)


def test_modules_and_what_they_keep_themselves_are_set() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout, self.drop_path, self.dropped = 0.1, 0.3, True
            self.inner = torch.nn.Dropout1d(0.2)

    module = Attention()
    assert has_dropout(module)
    set_dropout(module, 0.5)
    assert (module.attention_dropout, module.drop_path, module.inner.p, module.dropped) == (0.5, 0.0, 0.5, True)
    set_dropout(module, 0.0)
    assert not has_dropout(module)


@pytest.mark.parametrize(("given", "draws"), [(0.0, False), ("checkpoint", True), (0.2, True)])
def test_training_draws_masks_only_where_they_are_asked_for(text_config: Make, given: object, draws: bool) -> None:
    config = text_config(model__dropout=given, train__local_steps=2)
    home = Resident(config)
    states = []
    for seed in (1, 2):
        home.adapted.load(home.adapted.initial, home.adapted.scaling)
        turn = Turn(0, "site-0", 1, 4, dropout_seed=seed)
        train_locally(home.adapted, home.data.train, home.partition.indices[0], config.train, turn)
        states.append(home.adapted.tensors(home.adapted.trained))
    assert draws == any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_is_no_probability_is_refused_with_the_word_that_is_allowed(text_config: Make) -> None:
    for wrong in ("none", 1.0, -0.1, True):
        with pytest.raises(ConfigError, match=r"model\.dropout = .*0 to below 1, or 'checkpoint'"):
            text_config(model__dropout=wrong)
