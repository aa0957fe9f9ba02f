from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.errors import DataError
from fedpeft.models import num_threads
from fedpeft.simulations.grids.inline import InlineGrid

MakeContexts = Callable[[int], dict[int, Context]]
MakeMessage = Callable[..., Message]
MakeArrays = Callable[..., ArrayRecord]


@pytest.fixture
def grid(make_contexts: MakeContexts) -> InlineGrid:
    return InlineGrid("simulated_clients:app", make_contexts(4))


def seen(reply: Message, key: str) -> object:
    return reply.content.config_records["seen"][key]


def test_a_message_is_pulled_when_its_reply_is_asked_for(grid: InlineGrid, make_message: MakeMessage) -> None:
    pulled = []

    def messages() -> Iterator[Message]:
        for node_id in (3, 1, 4):
            pulled.append(node_id)
            yield make_message(node_id)

    replies = grid.send_and_receive(messages())
    assert pulled == []
    assert [(seen(reply, "partition"), list(pulled)) for reply in replies] == [(2, [3]), (0, [3, 1]), (3, [3, 1, 4])]


def test_a_client_can_be_repeated_between_two_replies(grid: InlineGrid, make_message: MakeMessage) -> None:
    partitions = []
    for reply in grid.send_and_receive(make_message(node_id) for node_id in (1, 2, 3)):
        (again,) = grid.send_and_receive([make_message(reply.metadata.src_node_id)])
        partitions += [seen(reply, "partition"), seen(again, "partition")]
    assert partitions == [0, 0, 1, 1, 2, 2]


def test_state_is_kept_only_where_the_client_did_not_raise(grid: InlineGrid, make_message: MakeMessage) -> None:
    counts = [make_message(2, "train.count", fail=fail) for fail in (0, 0, 1, 0)]
    replies = list(grid.send_and_receive(counts))
    assert [reply.has_error() for reply in replies] == [False, False, True, False]
    assert [seen(replies[index], "before") for index in (0, 1, 3)] == [0, 1, 2]
    assert grid.contexts[2].state.array_records["kept"]["n"].numpy().tolist() == [3.0]
    assert len(grid.contexts[1].state) == 0


def test_what_a_client_changes_in_context_and_message_reaches_nobody(
    grid: InlineGrid, make_message: MakeMessage, make_arrays: MakeArrays
) -> None:
    arrays = make_arrays(3, 5)
    list(grid.send_and_receive([make_message(2, "train.count"), make_message(2, "train.same", arrays, spoil=1)]))
    assert grid.contexts[2].node_config["partition-id"] == 1
    assert list(arrays) == ["layer.3", "layer.5", "layer.0"]


def test_messages_with_the_same_arrays_bring_the_same_object_unless_a_client_spoiled_it(
    grid: InlineGrid, make_message: MakeMessage, make_arrays: MakeArrays
) -> None:
    first, second = make_arrays(3, 5), make_arrays(3, 5)
    messages = [
        make_message(1, "train.same", first),
        make_message(2, "train.same", first),
        make_message(3, "train.same", second),
        make_message(4, "train.same", second, spoil=1),
        make_message(1, "train.same", second),
    ]
    replies = list(grid.send_and_receive(messages))
    assert [seen(reply, "known") for reply in replies] == [0, 1, 0, 1, 0]
    assert [seen(reply, "total") for reply in replies] == [8.0] * 5


def test_clients_get_their_threads_and_the_caller_gets_its_own_back(
    make_contexts: MakeContexts, make_message: MakeMessage
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        grid = InlineGrid("simulated_clients:app", make_contexts(2), threads=2)
        for reply in grid.send_and_receive([make_message(1, "query"), make_message(2, "train.fail", how="plain")]):
            assert torch.get_num_threads() == 3
            assert reply.has_error() or seen(reply, "threads") == 2
    finally:
        torch.set_num_threads(before)


def test_a_client_speaks_for_itself_and_the_server_for_itself_again_afterwards(
    make_contexts: MakeContexts, make_message: MakeMessage
) -> None:
    app = ClientApp()
    identities = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        identities.append((TaskIdentity.run_id, TaskIdentity.node_id))
        return Message(message.content, reply_to=message)

    grid = InlineGrid(app, make_contexts(3))
    server = TaskIdentity.node_id
    for _ in grid.send_and_receive([make_message(3), make_message(1)]):
        assert TaskIdentity.node_id == server
    assert identities == [(1, 3), (1, 1)]


def test_an_interrupt_passes_through(make_contexts: MakeContexts, make_message: MakeMessage) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), InlineGrid(app, make_contexts(1)) as grid:
        list(grid.send_and_receive([make_message(1)]))


def test_after_the_timeout_no_more_messages_are_pulled(grid: InlineGrid, make_message: MakeMessage) -> None:
    assert list(grid.send_and_receive([make_message(1)], timeout=0.0)) == []
    assert len(list(grid.send_and_receive([make_message(1), make_message(2)], timeout=3600.0))) == 2


def test_work_that_is_no_clients_is_done_here_with_a_clients_threads_when_its_result_is_asked_for() -> None:
    before, pulled = torch.get_num_threads(), []
    with num_threads(before + 1):
        results = InlineGrid("simulated_clients:app", threads=1).map("simulated_work:where", map(pulled.append, "ab"))
        assert pulled == []
        assert next(iter(results)) == (None, os.getpid(), 1)
        assert pulled == ["a"]
        assert torch.get_num_threads() == before + 1


def test_work_is_given_what_is_shared_and_what_it_raises_is_raised(grid: InlineGrid) -> None:
    assert list(grid.map("simulated_work:plus", [1, 2], np.ones(3), 0.5)) == [4.5, 5.5]
    with pytest.raises(DataError, match="job 1 holds no rows"):
        list(grid.map("simulated_work:refuse", [0, 1]))
