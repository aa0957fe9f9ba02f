"""(IA)^3 scales outputs, and of feed-forwards the inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError
from fedpeft.resident import Resident

Make = Callable[..., RunConfig]


def sizes(config: RunConfig) -> set[int]:
    adapted = Resident(config).adapted
    return {adapted.initial[name].numel() for name in adapted.trained if "ia3_l" in name}


@pytest.mark.parametrize(
    ("own", "trained"),
    [
        ({}, {16}),
        ({"adapter__targets": "intermediate.dense"}, {24}),
        ({"adapter__targets": "intermediate.dense", "adapter__feedforward_modules": "intermediate.dense"}, {16}),
        ({"adapter__targets": "key,value,output.dense"}, {16, 24}),
    ],
)
def test_feed_forwards_are_scaled_on_their_inputs(own: dict[str, str], trained: set[int], text_config: Make) -> None:
    assert sizes(text_config(adapter__kind="ia3", **own)) == trained


def test_a_feed_forward_that_is_no_target_is_an_error(text_config: Make) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.feedforward_modules = down names none of adapter\.targets"):
        sizes(text_config(adapter__kind="ia3", adapter__feedforward_modules="down"))
