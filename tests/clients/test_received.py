"""What is computed of an order's arrays is computed once for the clients that share them."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord

from fedpeft.adapters.state import fingerprint
from fedpeft.clients.received import decoded, fingerprint_of, once_each
from fedpeft.wire import to_record


def test_one_object_is_looked_at_once_and_an_equal_one_anew() -> None:
    seen: list[ArrayRecord] = []
    look = once_each(lambda record: seen.append(record) or len(seen))  # type: ignore[func-returns-value]
    one, other = (to_record({"w": torch.ones(2, 3)}) for _ in range(2))
    assert [look(one), look(one), look(other), look(other), look(one)] == [1, 1, 2, 2, 3]


def test_clients_of_a_round_share_the_decoded_tensors() -> None:
    record = to_record({"w": torch.ones(2, 3)})
    assert decoded(record)["w"] is decoded(record)["w"]
    assert fingerprint_of(record) == fingerprint({"w": torch.ones(2, 3)})
