"""What both grids promise, tried on the one in this process; `test_ray_grid` tries the rest on the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flwr.app import Context, Message
from flwr.supercore.run import Run

from fedpeft.simulations.grids.inline import InlineGrid

MakeContexts = Callable[[int], dict[int, Context]]
MakeMessage = Callable[..., Message]


@pytest.fixture
def grid(make_contexts: MakeContexts) -> InlineGrid:
    return InlineGrid("simulated_clients:app", make_contexts(4))


def test_message_ids_tell_round_kind_client_and_attempt(grid: InlineGrid, make_message: MakeMessage) -> None:
    messages = [make_message(2), make_message(4), make_message(2), make_message(2, group="2")]
    replies = list(grid.send_and_receive(messages))
    assert [message.metadata.message_id for message in messages] == [
        "1/train/2/0",
        "1/train/4/0",
        "1/train/2/1",
        "2/train/2/0",
    ]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [m.metadata.message_id for m in messages]
    assert len({reply.metadata.message_id for reply in replies} | {m.metadata.message_id for m in messages}) == 8


def test_a_message_carries_the_run_and_the_server_whatever_was_set_when_it_was_made(
    grid: InlineGrid, make_message: MakeMessage
) -> None:
    message = make_message(3)
    grid.set_run(Run.create_empty(77))
    (reply,) = grid.send_and_receive([message])
    assert grid.run.run_id == message.metadata.run_id == reply.metadata.run_id == 77
    assert message.metadata.src_node_id == reply.metadata.dst_node_id not in grid.get_node_ids()
    assert message.metadata.dst_node_id == reply.metadata.src_node_id == 3


def test_pushed_messages_are_answered_when_pulled(grid: InlineGrid, make_message: MakeMessage) -> None:
    ids = grid.push_messages([make_message(1), make_message(2), make_message(3)])
    replies = grid.pull_messages([ids[2], "unknown", ids[0]])
    assert [reply.metadata.reply_to_message_id for reply in replies] == [ids[2], ids[0]]
    assert grid.pull_messages([ids[0]]) == []
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [2]


def test_a_node_id_that_no_client_has_is_an_error(grid: InlineGrid, make_message: MakeMessage) -> None:
    with pytest.raises(ValueError, match="no client has node id 9"):
        list(grid.send_and_receive([make_message(9)]))


def test_create_message_makes_what_the_message_class_makes(grid: InlineGrid, make_message: MakeMessage) -> None:
    made = grid.create_message(make_message(1).content, "train.count", 3, "8", ttl=5.0)
    assert (made.metadata.dst_node_id, made.metadata.message_type) == (3, "train.count")
    assert (made.metadata.group_id, made.metadata.ttl) == ("8", 5.0)
    assert grid.get_node_ids() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("how", "reason", "told"),
    [
        ("plain", "KeyError", "row 17"),
        ("caused", "KeyError", "TrainingError: no luck"),
        ("exit", "SystemExit", "sys.exit(3)"),
        ("none", "TypeError", "NoneType"),
        ("own", "ValueError", "reply_to"),
    ],
)
def test_a_reply_says_the_class_of_an_error_and_the_traceback_stays_with_the_grid(
    grid: InlineGrid, make_message: MakeMessage, how: str, reason: str, told: str
) -> None:
    failures: list[tuple[int, Message, str]] = []
    grid.on_failure = lambda *failure: failures.append(failure)
    message = make_message(2, "train.fail", how=how)
    (reply,) = grid.send_and_receive([message])
    assert reply.error.reason == reason
    ((node_id, failed, trace),) = failures
    assert (node_id, failed) == (2, message)
    assert told in trace
    assert "Traceback (most recent call last)" in trace
    if how == "caused":
        assert "row 17" in trace
