"""What follows from an order's arrays alone, computed once for all clients of a round that this process trains.

They share one record object, so that the last one is all that need be remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flwr.app import ArrayRecord

from fedpeft.adapters.state import fingerprint
from fedpeft.wire import to_tensors

Value = TypeVar("Value")


def once_each(compute: Callable[[ArrayRecord], Value]) -> Callable[[ArrayRecord], Value]:
    """Remember what was computed of a record for as long as the very same object is asked about."""
    last: tuple[ArrayRecord, Value] | None = None

    def of(record: ArrayRecord) -> Value:
        nonlocal last
        if last is None or last[0] is not record:
            last = (record, compute(record))
        return last[1]

    return of


decoded = once_each(to_tensors)
# not of what is decoded: a simulation's driver hashes another object than its clients decode
fingerprint_of = once_each(lambda record: fingerprint(to_tensors(record)))
