from __future__ import annotations

from collections.abc import Callable

import pytest
from flwr.app import Message

from fedpeft.simulations.grids.base import SERVER_NODE_ID, speak_for
from fedpeft.simulations.grids.pace import MOST_BYTES, MOST_MESSAGES, QUICK_SECONDS, Pace

MakeMessage = Callable[..., Message]


@pytest.fixture(autouse=True)
def speaking() -> None:
    """Let this process make messages, as a grid does."""
    speak_for(1, SERVER_NODE_ID)


def test_before_anything_is_known_the_work_is_what_is_expected(make_message: MakeMessage) -> None:
    pace = Pace(lambda message: 10.0 * message.metadata.dst_node_id)
    assert [pace.expected(make_message(node)) for node in (1, 3)] == [10.0, 30.0]


def test_who_has_answered_is_expected_to_take_as_long_and_others_by_their_work(make_message: MakeMessage) -> None:
    pace = Pace(lambda message: float(message.metadata.dst_node_id))
    pace.learn(make_message(2), 4.0)
    pace.learn(make_message(4), 2.0)  # six seconds for six
    assert [pace.expected(make_message(node)) for node in (2, 4, 5)] == [4.0, 2.0, 5.0]
    assert pace.expected(make_message(2, "evaluate")) == 2.0
    pace.learn(make_message(2), 1.0)
    pace.learn(make_message(2), 9.0)  # the machine was busy
    assert pace.expected(make_message(2)) == 1.0


def sizes(pace: Pace, messages: list[Message], workers: int = 1) -> list[int]:
    bundles = list(pace.bundles(iter(messages), workers))
    assert [message for bundle in bundles for message in bundle] == messages
    return [len(bundle) for bundle in bundles]


def test_quick_messages_travel_together_and_others_alone(make_message: MakeMessage) -> None:
    messages = [make_message(node) for node in range(1, 11)]
    pace = Pace()
    assert sizes(pace, messages) == [1] * 10  # nothing is known
    pace.learn(messages[0], QUICK_SECONDS / 2.5)
    assert sizes(pace, messages) == [3, 3, 3, 1]
    pace.learn(messages[4], QUICK_SECONDS)
    assert sizes(pace, messages)[-1] < 3


@pytest.mark.parametrize(("num_bytes", "most"), [(0, MOST_MESSAGES), (MOST_BYTES // 4, 4), (2 * MOST_BYTES, 1)])
def test_large_replies_do_not_travel_together(make_message: MakeMessage, num_bytes: int, most: int) -> None:
    messages = [make_message(node) for node in range(1, 2 * MOST_MESSAGES + 1)]
    pace = Pace()
    pace.learn(messages[0], 1e-6, num_bytes)
    assert max(sizes(pace, messages)) == most


def test_no_client_is_twice_in_what_travels_together(make_message: MakeMessage) -> None:
    pace = Pace()
    pace.learn(make_message(1), 1e-6)
    assert sizes(pace, [make_message(node) for node in (1, 2, 3, 2, 4, 1, 1)]) == [3, 3, 1]


@pytest.mark.parametrize(
    ("count", "workers", "expected"), [(2, 2, [1, 1]), (5, 2, [3, 2]), (7, 3, [3, 3, 1]), (1, 4, [1]), (8, 1, [8])]
)
def test_no_worker_idles_beside_one_that_is_given_several(
    make_message: MakeMessage, count: int, workers: int, expected: list[int]
) -> None:
    pace = Pace()
    pace.learn(make_message(1), 1e-6)
    assert sizes(pace, [make_message(node) for node in range(1, count + 1)], workers) == expected
