"""What is in a bundle follows from the messages alone, and one client's trouble is its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedpeft.simulations.grids.bundles import Bundling, Job, nodes_of
from fedpeft.simulations.grids.inline import InlineGrid

MakeContexts = Callable[[int], dict[int, Context]]
MakeMessage = Callable[..., Message]
seen: list[list[int]] = []


def odd_ones(jobs: Sequence[Job]) -> list[RecordDict | None]:
    """Answer clients of odd numbers, and leave the others to be answered alone."""
    nodes = [context.node_id for _, context, _ in jobs]
    seen.append(nodes)
    for _, context, _ in jobs:
        context.state["kept"] = ConfigRecord({"node": context.node_id})
    return [RecordDict({"seen": ConfigRecord({"together": node})}) if node % 2 else None for node in nodes]


def cut(size: int, messages: Sequence[Message]) -> list[list[int]]:
    return [[m.metadata.dst_node_id for m in bundle] for bundle in Bundling(size, "").bundles(iter(messages))]


@pytest.fixture
def grid(make_contexts: MakeContexts) -> InlineGrid:
    grid = InlineGrid("simulated_clients:app", make_contexts(12))
    grid.bundling = Bundling(3, f"{__name__}:odd_ones")
    seen.clear()
    return grid


def test_bundles_are_cut_in_the_order_of_messages(grid: InlineGrid, make_message: MakeMessage) -> None:
    del grid  # which says for whom messages are
    plain = [make_message(node) for node in (1, 2, 3, 4, 5)]
    assert cut(2, plain) == [[1, 2], [3, 4], [5]]
    assert cut(1, plain) == [[1], [2], [3], [4], [5]]
    assert cut(3, [make_message(node) for node in (1, 2, 1, 3)]) == [[1, 2], [1, 3]]  # one message a client at a time
    assert cut(3, [make_message(1), make_message(2, "query"), make_message(3)]) == [[1], [2], [3]]
    assert cut(3, [make_message(1), make_message(2, group="2")]) == [[1], [2]]
    assert nodes_of(tuple(plain)) == {1, 2, 3, 4, 5}


def test_replies_of_a_bundle_come_one_by_one_and_in_order(
    grid: InlineGrid, make_message: MakeMessage, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules["__main__"])
    dispatched = []
    grid.on_dispatch = lambda node, _: dispatched.append(node)
    messages = [make_message(node) for node in (1, 2, 3, 4)]
    replies = list(grid.send_and_receive(messages))
    assert dispatched == [1, 2, 3, 4]
    assert seen == [[1, 2, 3]]  # the fourth is alone
    told = [dict(reply.content.config_records["seen"]) for reply in replies]
    assert [each.get("together", each.get("partition")) for each in told] == [1, 1, 3, 3]
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert [r.metadata.src_node_id for r in replies] == [1, 2, 3, 4]
    assert "kept" in grid.contexts[1].state
