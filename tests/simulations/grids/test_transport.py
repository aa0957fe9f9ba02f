from __future__ import annotations

import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedpeft.simulations.grids.transport import (
    Newest,
    PackedArrays,
    SharedRecords,
    contents,
    duplicate,
    duplicate_arrays,
    pack,
    unpack,
)


def through_pickle(value: object) -> tuple[object, list[pickle.PickleBuffer], bytes]:
    """Send a value as Ray does: buffers outside the stream."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(stream, buffers=[memoryview(buffer) for buffer in buffers]), buffers, stream


@given(
    st.dictionaries(
        st.text(max_size=5),
        arrays_of.arrays(
            st.sampled_from([np.float32, np.int64, np.bool_]), arrays_of.array_shapes(min_dims=0, min_side=0)
        ),
        max_size=3,
    )
)
def test_records_come_through_as_they_were(values: dict[str, np.ndarray]) -> None:
    records = RecordDict(
        {
            "first": MetricRecord({"loss": 0.1, "parts": [1, 2]}),
            "arrays": ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in values.items()}),
            "last": ConfigRecord({"name": "x", "raw": b"\0"}),
        }
    )
    received, _, _ = through_pickle(pack(records))
    again = unpack(received)  # type: ignore[arg-type]
    assert again == records
    assert list(again) == list(records)
    assert list(again.array_records["arrays"]) == list(records.array_records["arrays"])
    assert all(type(array.data) is bytes for array in again.array_records["arrays"].values())


def test_array_bytes_are_copied_neither_when_packed_nor_when_pickled() -> None:
    record = ArrayRecord({"w": Array(np.ones(100_000, np.float32))})
    _, (buffer,), stream = through_pickle(PackedArrays.of(record))
    assert np.shares_memory(np.frombuffer(memoryview(buffer), np.uint8), np.frombuffer(record["w"].data, np.uint8))
    assert len(stream) < 1000


def test_records_whose_object_ids_were_computed_can_be_packed_and_duplicated() -> None:
    records = RecordDict({"arrays": ArrayRecord({"w": Array(np.ones(3))})})
    assert records.object_id
    received, _, _ = through_pickle(pack(records))
    assert unpack(received) == duplicate(records) == records  # type: ignore[arg-type]


def test_a_duplicate_shares_bytes_and_nothing_that_can_change() -> None:
    records = RecordDict({"arrays": ArrayRecord({"w": Array(np.ones(3))}), "config": ConfigRecord({"list": [1, 2]})})
    twin = duplicate(records)
    assert twin.array_records["arrays"]["w"].data is records.array_records["arrays"]["w"].data
    twin.array_records["arrays"]["w"].dtype = "int8"
    twin.config_records["config"]["list"].append(3)  # type: ignore[union-attr, arg-type]
    twin["new"] = MetricRecord()
    assert records.array_records["arrays"]["w"].dtype == "float64"
    assert records.config_records["config"]["list"] == [1, 2]
    assert "new" not in records


def test_contents_are_equal_for_the_same_bytes_under_the_same_names_only() -> None:
    record = ArrayRecord({"w": Array(np.ones(3)), "v": Array(np.ones(4))})
    assert contents(duplicate_arrays(record)) == contents(record)
    equal_elsewhere = ArrayRecord({name: Array(array.numpy()) for name, array in record.items()})
    before = contents(record)
    assert contents(equal_elsewhere) != before
    record["w"] = Array(np.ones(3))
    assert contents(record) != before
    assert contents(ArrayRecord({"u": record["v"]})) != contents(ArrayRecord({"v": record["v"]}))


def test_the_entry_that_was_not_used_for_longest_makes_room() -> None:
    kept: Newest[str] = Newest(2)
    kept.put("a", "A")
    kept.put("b", "B")
    assert kept.get("a") == "A"
    assert kept.put("c", "C") == "C"
    assert [kept.get(key) for key in "abc"] == ["A", None, "C"]


@pytest.mark.parametrize("spoil", ["remove", "replace", "rewrite"])
def test_a_shared_record_is_the_same_object_until_someone_changes_it(spoil: str) -> None:
    original = ArrayRecord({"w": Array(np.ones(3)), "v": Array(np.ones(4))})
    shared = SharedRecords()
    first = shared.get("key", lambda: duplicate_arrays(original))
    assert shared.get("key", lambda: duplicate_arrays(original)) is first
    if spoil == "remove":
        del first["w"]
    elif spoil == "replace":
        first["w"] = Array(np.zeros(3))
    else:
        first["w"].data = Array(np.zeros(3)).data
    second = shared.get("key", lambda: duplicate_arrays(original))
    assert second is not first
    assert second == original
