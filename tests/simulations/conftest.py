from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

APPS = Path(__file__).parent / "apps"


@pytest.fixture(scope="session", autouse=True)
def importable_apps() -> Iterator[None]:
    """Let this process import the tests' ClientApp, and the workers that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(APPS), *sys.path])
        patch.setenv("PYTHONPATH", str(APPS), prepend=":")
        yield


@pytest.fixture
def make_contexts() -> Callable[[int], dict[int, Context]]:
    """Return ``make_contexts(clients)``, the contexts by node id."""

    def make(clients: int) -> dict[int, Context]:
        return {
            index + 1: Context(
                1, index + 1, {"partition-id": index, "num-partitions": clients}, RecordDict(), {"rate": 0.5}
            )
            for index in range(clients)
        }

    return make


@pytest.fixture
def make_message() -> Callable[..., Message]:
    """Return ``make_message(node_id, type, arrays=None, round=1, **config)``."""

    def make(
        node_id: int,
        kind: str = "train",
        arrays: ArrayRecord | None = None,
        group: str = "1",
        **config: str | int | float,
    ) -> Message:
        content = RecordDict({"config": ConfigRecord(dict(config))})
        if arrays is not None:
            content["arrays"] = arrays
        return Message(content, node_id, kind, group_id=group)

    return make


@pytest.fixture
def make_arrays() -> Callable[..., ArrayRecord]:
    """Return ``make_arrays(*sizes)``: a record of vectors of ones, plus an empty one."""

    def make(*sizes: int) -> ArrayRecord:
        return ArrayRecord({f"layer.{size}": Array(np.ones(size, np.float32)) for size in (*sizes, 0)})

    return make
