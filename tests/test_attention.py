from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification
from transformers.models.llama.modeling_llama import eager_attention_forward

from fedpeft.attention import EAGER, PLAIN, attention_for, plain_attention
from fedpeft.config import RunConfig
from fedpeft.resident import Resident

CPU = torch.device("cpu")


def test_only_a_16_bit_base_on_a_cpu_has_another_attention_than_transformers_own() -> None:
    bert = BertForSequenceClassification
    config = bert.config_class()
    assert attention_for(bert, config, False, CPU) is None
    assert attention_for(bert, config, True, torch.device("cuda")) is None
    assert attention_for(bert, config, True, CPU) == PLAIN
    assert attention_for(None, config, True, CPU) == EAGER


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_plain_attention_is_transformers_eager_attention(groups: int, masked: bool) -> None:
    class Layer(torch.nn.Module):
        num_key_value_groups = groups

    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 4 // groups, 6, 8), torch.randn(2, 4 // groups, 6, 8)
    mask = torch.zeros(2, 1, 5, 6).masked_fill(torch.rand(2, 1, 5, 6) < 0.3, torch.finfo(torch.float32).min)
    layer: Any = Layer()
    given = (layer, query, key, value, mask if masked else None)
    wanted, _ = eager_attention_forward(*given, scaling=0.3)
    found, _ = plain_attention(*given, scaling=0.3)
    torch.testing.assert_close(found, wanted)


def test_a_16_bit_model_computes_what_it_computes_eagerly(text_config: Callable[..., RunConfig]) -> None:
    home = Resident(text_config(train__precision="bf16"))
    model = home.adapted.model
    batch = home.data.train.batch(range(8))
    batch.pop("labels")
    assert model.config._attn_implementation == PLAIN
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = model(**batch).logits
        model.get_base_model().set_attn_implementation("eager")
        eager = model(**batch).logits
    torch.testing.assert_close(plain, eager, rtol=0.05, atol=0.05)
