"""What a client answers, as far as it must make sense before anybody looks at its tensors."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedpeft.errors import DeploymentError
from fedpeft.strategies.rounds.answers import known_clients
from fedpeft.wire import METRICS_RECORD, TrainOrder, to_tensors
from tests.strategies.test_base import Client, FunctionGrid, adding, reply_with, run


def saying(key: str, value: Any) -> Client:
    """Make a client that trains and says one thing wrongly."""

    def client(message: Message) -> Message:
        reply = reply_with(message, to_tensors(TrainOrder.from_record(message.content).arrays))
        reply.content.metric_records[METRICS_RECORD][key] = value
        return reply

    return client


def speechless(message: Message) -> Message:
    return Message(RecordDict({"arrays": ArrayRecord()}), reply_to=message)


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (speechless, "the reply lacks 'arrays' or 'metrics'"),
        (saying("num-examples", 0), "num-examples = 0, expected a whole number of at least 1"),
        (saying("train_loss", [0.5]), "train_loss = [0.5], expected a number"),
        (saying("spent-steps", 3), "noise-multiplier = None, expected a number"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused_by_the_name_of_its_key(client: Client, reason: str) -> None:
    _, (report,), _ = run({1: adding(1.0), 2: client})
    assert [(fault.client_id, fault.reason) for fault in report.faults] == [("1", f"update refused: {reason}")]
    assert [update.client_id for update in report.updates] == ["0"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict(), "no client id in its answer"),
        (RecordDict({"config": ConfigRecord({"client-id": 3})}), "client-id = 3, expected a text"),
    ],
)
def test_a_node_that_does_not_say_who_it_is_ends_the_run(content: RecordDict, reason: str) -> None:
    grid = FunctionGrid({7: lambda message: Message(content, reply_to=message)})
    with pytest.raises(DeploymentError, match=f"could not say which client it is: {reason}"):
        known_clients(grid, {}, None)
