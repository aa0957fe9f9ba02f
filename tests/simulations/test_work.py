from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Message, MessageType, RecordDict

from fedpeft.config import RunConfig
from fedpeft.resident import resident
from fedpeft.simulations.contexts import Contexts
from fedpeft.simulations.grids.base import SERVER_NODE_ID, speak_for
from fedpeft.simulations.work import Work

Make = Callable[..., RunConfig]


def works(config: RunConfig, folder: Path) -> list[float]:
    speak_for(1, SERVER_NODE_ID)
    home = resident(config)
    work = Work(config, home, Contexts(home.partition.client_ids, {}, {}, folder))
    messages = [Message(RecordDict(), node, MessageType.TRAIN) for node in range(1, len(home.partition.client_ids) + 1)]
    assert work(Message(RecordDict(), 1, MessageType.QUERY)) == 1.0
    return [work(message) for message in messages]


def test_a_client_has_as_much_to_do_as_it_trains_on_words(text_config: Make, tmp_path: Path) -> None:
    config = text_config(train__local_steps=None, train__local_epochs=3, train__batch_size=1)
    home = resident(config)
    words = [3 * float(home.data.train.lengths[rows].sum()) for rows in home.partition.indices]
    found = works(config, tmp_path)
    assert [round(work, 6) for work in found] == words
    assert works(text_config(train__batch_size=1), tmp_path)[0] < found[0]
