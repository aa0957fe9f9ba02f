"""SHiRA, and the other kinds that train numbers at drawn places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.state import fingerprint
from fedpeft.config import RunConfig
from fedpeft.resident import Resident

Make = Callable[..., RunConfig]


def places(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in adapted.initial.items() if name.endswith("indices")}


def test_layers_of_one_shape_train_different_entries(text_config: Make) -> None:
    adapted = Resident(text_config(adapter__kind="shira")).adapted
    drawn = list(places(adapted).values())
    assert len(drawn) == len(adapted.layers)
    for number, one in enumerate(drawn):
        assert len(set(map(tuple, one.T.tolist()))) == one.shape[1] == 2 * (16 + 16)
        assert not any(torch.equal(one, other) for other in drawn[:number])
    layer: Any = adapted.model.get_submodule(next(iter(places(adapted))).rpartition(".")[0])
    with torch.no_grad():
        layer.shira_weight["default"].fill_(1.0)
    changed = layer.get_delta_weight("default").to_dense().nonzero().T
    assert torch.equal(changed, drawn[0].long())  # whose order is that of rows


@pytest.mark.parametrize("kind", ["fourierft", "waveft"])
def test_places_that_peft_does_not_save_follow_from_the_runs_seed_and_are_compared(
    kind: str, text_config: Make, small: dict[str, Any]
) -> None:
    one, two, other = (
        Resident(text_config(adapter__kind=kind, run__seed=seed, **small[kind])).adapted for seed in (1, 1, 2)
    )
    assert places(one)
    assert set(places(one)) == set(one.frozen)
    assert one.frozen_hash == two.frozen_hash == fingerprint(places(two)) != other.frozen_hash
