"""LN tuning takes norms where other kinds take linear layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from fedpeft.adapters.kinds.ln_tuning import norms
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import AdapterError
from fedpeft.resident import Resident

Make = Callable[..., RunConfig]


def test_all_norms_are_taken_unless_some_are_named(text_config: Make) -> None:
    assert len(Resident(text_config(adapter__kind="ln_tuning")).adapted.layers) == 5  # of embeddings and two layers
    named = Resident(text_config(adapter__kind="ln_tuning", adapter__targets="output.LayerNorm")).adapted.layers
    assert len(named) == 4
    with pytest.raises(AdapterError, match=r"'query' is no norm.*Allowed: LayerNorm"):
        _ = Resident(text_config(adapter__kind="ln_tuning", adapter__targets="query")).adapted


def test_linear_layers_that_a_preset_names_are_left_to_other_kinds() -> None:
    config = resolve([nest({"adapter.targets": "query"}), nest({"adapter.kind": "ln_tuning"})])
    assert config.adapter.targets is None


def test_norms_of_batches_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 4))
    assert norms(model, None) == ["1"]
    with pytest.raises(AdapterError, match="this model has none"):
        norms(model[0], None)
