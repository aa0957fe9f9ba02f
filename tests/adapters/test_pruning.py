"""HetLoRA's pruning at a client, against its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.adapters.pruning import Tail
from fedpeft.adapters.state import A_SUFFIX, B_SUFFIX
from fedpeft.config import RunConfig
from fedpeft.errors import MessageError
from fedpeft.resident import resident


@pytest.fixture
def adapted(text_config: Callable[..., RunConfig]) -> AdaptedModel:
    adapted = resident(text_config()).adapted
    adapted.load({name: tensor + 0.5 for name, tensor in adapted.initial.items()}, adapted.scaling)
    return adapted


def test_the_penalty_is_that_of_the_paper(adapted: AdaptedModel) -> None:
    tail = Tail.of(adapted, {"pruned-rank": 1, "tail-penalty": 0.25})
    assert tail is not None
    loaded = adapted.tensors(adapted.initial)
    layers = [name.removesuffix(A_SUFFIX) for name in loaded if name.endswith(A_SUFFIX)]
    sizes = [loaded[n + B_SUFFIX][:, 1:].norm() * loaded[n + A_SUFFIX][1:].norm() for n in layers]
    torch.testing.assert_close(tail.loss().detach().cpu(), 0.25 * sum(sizes, torch.zeros(())))


def test_the_last_ranks_are_left_out_only_once_they_have_shrunk(adapted: AdaptedModel) -> None:
    tail = Tail.of(adapted, {"pruned-rank": 1, "tail-penalty": 0.25})
    assert tail is not None
    tensors = adapted.tensors(adapted.initial)
    assert tail.left_out(tensors) is tensors
    for _, B in tail.factors:
        B.data[:, 1:] *= 0.5
    assert {len(tensor) for name, tensor in tail.left_out(tensors).items() if name.endswith(A_SUFFIX)} == {1}


def test_an_order_that_says_nothing_of_it_prunes_nothing(adapted: AdaptedModel) -> None:
    assert Tail.of(adapted, {"another": 1.0}) is None


@pytest.mark.parametrize("settings", [{"pruned-rank": 1}, {"pruned-rank": "1", "tail-penalty": 0.1}])
def test_settings_that_are_no_numbers_are_refused(settings: dict[str, object], adapted: AdaptedModel) -> None:
    with pytest.raises(MessageError, match=r"pruned-rank = .*, tail-penalty = .*, expected numbers"):
        Tail.of(adapted, settings)
