"""Shapes that a kind cannot adapt: one line that names the layer and what to set, and what it names works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from fedpeft.adapters.kinds.blocks import divides
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError
from fedpeft.resident import Resident

Make = Callable[..., RunConfig]


class Settings:
    size = 6


@pytest.mark.parametrize(
    ("sides", "shape", "says"),
    [
        ({"inputs": True}, (16, 24), ""),
        ({"inputs": True}, (24, 16), "adapter.size = 6 must divide its inputs; set it to 4"),
        (
            {"outputs": True, "inputs": True},
            (24, 20),
            "= 6 must divide its outputs and inputs; set it to 4",
        ),
        ({"outputs": True, "even": True}, (20, 9), "adapter.size = 6 must be even and divide its outputs; set it to 4"),
        ({"outputs": True, "even": True}, (9, 6), "must be even and divide its outputs, which are odd; leave it out"),
    ],
)
def test_the_nearest_smaller_size_that_fits_is_named(sides: Any, shape: tuple[int, int], says: str) -> None:
    said = divides("size", **sides)(Settings, *shape)
    assert says in said
    assert bool(says) == bool(said)


@pytest.mark.parametrize(
    ("kind", "own", "mended"),
    [
        ("c3a", {"block_size": 256}, {"block_size": 8}),
        ("oft", {"oft_block_size": 32}, {"oft_block_size": 16}),
        ("boft", {"boft_block_size": 3}, {"boft_block_size": 2}),
        ("road", {"group_size": 64}, {"group_size": 24}),
        ("gralora", {"gralora_k": 3, "rank": 3}, {"gralora_k": 2, "rank": 2}),
        ("fourierft", {"n_frequency": 385}, {"n_frequency": 384}),
        ("waveft", {"n_frequency": 385}, {"n_frequency": 384}),
        ("shira", {"rank": 10}, {"rank": 9}),
        ("supertuning", {"sparsity": 0.999}, {"sparsity": 0.99}),
    ],
)
def test_a_layer_that_does_not_fit_is_named_with_what_to_set(
    kind: str, own: dict[str, Any], mended: dict[str, Any], text_config: Make
) -> None:
    def build(options: dict[str, Any]) -> Any:
        targets = "intermediate.dense"  # (24, 16)
        return Resident(text_config(adapter__kind=kind, adapter__targets=targets, **keys(options))).adapted

    layer = r"layer 'bert\.encoder\.layer\.0\.intermediate\.dense' of shape \(24, 16\)"
    option = next(iter(own))
    with pytest.raises(AdapterError, match=rf"'{kind}' does not fit {layer}: adapter\.{option} = ") as caught:
        build(own)
    assert "\n" not in str(caught.value)
    if numbers := re.search(r"(?:to|at most) (\d+)\.$", str(caught.value)):
        assert int(numbers[1]) in mended.values()
    assert build(mended).trained


def keys(options: dict[str, Any]) -> dict[str, Any]:
    return {f"adapter__{name}": value for name, value in options.items()}
