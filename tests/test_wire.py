"""Messages survive the wire, and what is not as it must be is refused by the name of its key."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters.state import PrivacyClaim, Role, TrainMetrics
from fedpeft.errors import MessageError
from fedpeft.wire import (
    CONFIG_RECORD,
    METRICS_RECORD,
    ORDER_KEYS,
    Identity,
    LentArray,
    ShortAnswer,
    TrainAnswer,
    TrainOrder,
    to_record,
    to_tensors,
    value_bytes,
)

WHOLE = st.integers(0, 2**62)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ROLES = st.frozensets(st.sampled_from(Role))
ARRAYS = st.lists(st.text(max_size=8), max_size=3, unique=True).map(
    lambda names: ArrayRecord({name: Array(np.full((2, 3), len(name), np.float32)) for name in names})
)
SETTINGS = st.dictionaries(st.text(max_size=8).filter(lambda key: key not in ORDER_KEYS), NUMBERS | WHOLE, max_size=3)
ORDERS = st.builds(
    TrainOrder,
    ARRAYS,
    server_round=WHOLE.filter(bool),
    num_rounds=WHOLE.filter(bool),
    scaling=NUMBERS,
    held_hash=st.text(max_size=8),
    rank=WHOLE,
    draw=WHOLE,
    trained=ROLES,
    personal=ROLES,
    kept=ROLES,
    settings=SETTINGS,
)
CLAIMS = st.none() | st.builds(PrivacyClaim, NUMBERS, NUMBERS, WHOLE)
METRICS = st.builds(TrainMetrics, st.none() | WHOLE, st.none() | NUMBERS, st.none() | NUMBERS, CLAIMS)
ANSWERS = st.builds(TrainAnswer, ARRAYS, WHOLE.filter(bool), METRICS)

ORDER = TrainOrder(ArrayRecord(), server_round=2, num_rounds=3, scaling=1.5, held_hash="x", trained=frozenset({Role.B}))
SPENT = PrivacyClaim(1.0, 0.5, 6)
ANSWER = TrainAnswer(ArrayRecord(), 5, TrainMetrics(3, 0.5, 1.0, SPENT))


def sent(content: RecordDict) -> RecordDict:
    """Return what is on the other side of Flower's own encoding."""
    return recorddict_from_proto(recorddict_to_proto(content))


@given(order=ORDERS)
def test_every_order_survives_the_wire(order: TrainOrder) -> None:
    assert TrainOrder.from_record(sent(order.to_record())) == order


@given(answer=ANSWERS)
def test_every_answer_survives_the_wire(answer: TrainAnswer) -> None:
    assert TrainAnswer.from_record(sent(answer.to_record())) == answer


@given(name=st.text())
def test_every_identity_survives_the_wire(name: str) -> None:
    assert Identity.from_record(sent(Identity(name).to_record())).client_id == name


@pytest.mark.parametrize("short", ShortAnswer)
def test_a_short_answer_is_told_from_the_other_and_from_none(short: ShortAnswer) -> None:
    assert ShortAnswer.from_record(sent(short.to_record())) is short
    assert ShortAnswer.from_record(ANSWER.to_record()) is None
    assert ShortAnswer.from_record(RecordDict({CONFIG_RECORD: ConfigRecord({short.value: False})})) is None


def test_orders_of_one_content_share_their_arrays() -> None:
    record = ArrayRecord({"w": Array(np.zeros(3))})
    content = TrainOrder(record, server_round=1, num_rounds=1, scaling=1.0).to_record()
    assert TrainOrder.from_record(content).arrays is record


def test_the_names_on_the_wire_are_those_that_older_sites_know() -> None:
    order, answer = ORDER.to_record(), ANSWER.to_record()
    assert dict(order.config_records["config"]) == {
        "server-round": 2,
        "num-rounds": 3,
        "scaling": 1.5,
        "held-hash": "x",
        "rank": 0,
        "draw": 0,
        "trained": ["B"],
        "personal": [],
        "kept": [],
    }
    assert dict(answer.metric_records["metrics"]) == {
        "num-examples": 5,
        "steps": 3,
        "train_loss": 0.5,
        "seconds": 1.0,
        "noise-multiplier": 1.0,
        "sample-rate": 0.5,
        "spent-steps": 6,
    }
    assert set(order) == {"arrays", "config"}
    assert set(answer) == {"arrays", "metrics"}
    assert dict(ShortAnswer.NEEDS_ARRAYS.to_record().config_records["config"]) == {"needs-arrays": True}
    assert dict(ShortAnswer.BUDGET_SPENT.to_record().config_records["config"]) == {"privacy-budget-spent": True}
    assert dict(Identity("a").to_record().config_records["config"]) == {"client-id": "a"}


@pytest.mark.parametrize("key", ORDER_KEYS)
def test_an_order_that_lacks_a_key_is_refused_by_its_name(key: str) -> None:
    content = replace(ORDER, control=ArrayRecord(), control_made_in=1).to_record()
    del content.config_records[CONFIG_RECORD][key]
    with pytest.raises(MessageError, match=f"^{key} = None, expected"):
        TrainOrder.from_record(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, wrong) for key in ("server-round", "num-rounds") for wrong in (0, 1.0, True, "1", [1])],
        *[(key, wrong) for key in ("rank", "draw") for wrong in (-1, 2.0, False, "0", b"0")],
        *[("scaling", wrong) for wrong in (math.nan, math.inf, "1.0", True, [1.0])],
        *[("held-hash", wrong) for wrong in (1, b"x", ["x"])],
        *[(key, wrong) for key in ("trained", "personal", "kept") for wrong in ("A", ["A", "stranger"], [1], 3)],
    ],
)
def test_an_ill_typed_key_of_an_order_is_refused_by_its_name(key: str, value: Any) -> None:
    content = ORDER.to_record()
    content.config_records[CONFIG_RECORD][key] = value
    with pytest.raises(MessageError, match=f"^{key} = .*expected"):
        TrainOrder.from_record(content)


@pytest.mark.parametrize("key", ["num-examples", "noise-multiplier", "sample-rate", "spent-steps"])
def test_an_answer_that_lacks_a_key_is_refused_by_its_name(key: str) -> None:
    content = ANSWER.to_record()
    del content.metric_records[METRICS_RECORD][key]
    with pytest.raises(MessageError, match=f"^{key} = None, expected"):
        TrainAnswer.from_record(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("num-examples", wrong) for wrong in (0, -1, 2.0, [1])],
        *[(key, wrong) for key in ("steps", "spent-steps") for wrong in (-1, 3.0, math.nan, [3])],
        *[(key, [1.0]) for key in ("train_loss", "seconds", "noise-multiplier", "sample-rate")],
    ],
)
def test_an_ill_typed_key_of_an_answer_is_refused_by_its_name(key: str, value: Any) -> None:
    content = ANSWER.to_record()
    content.metric_records[METRICS_RECORD][key] = value
    with pytest.raises(MessageError, match=f"^{key} = .*expected"):
        TrainAnswer.from_record(content)


def test_what_a_stranger_writes_at_length_is_not_repeated_at_length() -> None:
    content = ANSWER.to_record()
    content.metric_records[METRICS_RECORD]["num-examples"] = [1] * 10_000
    with pytest.raises(MessageError) as caught:
        TrainAnswer.from_record(content)
    assert len(str(caught.value)) < 120


def test_a_message_without_its_records_is_refused_by_their_names() -> None:
    with pytest.raises(MessageError, match="the order lacks 'arrays' or 'config'"):
        TrainOrder.from_record(RecordDict({"arrays": ArrayRecord()}))
    with pytest.raises(MessageError, match="the reply lacks 'arrays' or 'metrics'"):
        TrainAnswer.from_record(RecordDict({"metrics": MetricRecord({"num-examples": 1})}))
    with pytest.raises(MessageError, match="no client id in its answer"):
        Identity.from_record(RecordDict())
    with pytest.raises(MessageError, match="client-id = 3, expected a text"):
        Identity.from_record(RecordDict({CONFIG_RECORD: ConfigRecord({"client-id": 3})}))


def test_what_a_later_version_says_besides_is_left_alone() -> None:
    order, answer = ORDER.to_record(), ANSWER.to_record()
    order.config_records[CONFIG_RECORD]["later"] = "x"
    answer.metric_records[METRICS_RECORD]["later"] = 1.0
    assert TrainOrder.from_record(order).settings == {"later": "x"}
    assert TrainAnswer.from_record(answer) == ANSWER


ARRAYS = {
    "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "every other": np.arange(12, dtype=np.int64)[::2],
    "one number": np.array(2.5, np.float16),
    "nothing": np.zeros((0, 4), np.float32),
    "truths": np.array([True, False]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_tensors_are_written_as_flower_writes_arrays_and_read_as_it_reads_them(name: str) -> None:
    values = ARRAYS[name]
    theirs, ours = Array(values), to_record({"x": torch.from_numpy(values)})["x"]
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (theirs.dtype, theirs.shape, theirs.stype, theirs.data)
    lent = LentArray(theirs.dtype, theirs.shape, theirs.stype, memoryview(theirs.data))
    for array in (theirs, lent):
        record = ArrayRecord()
        record["x"] = array
        read = to_tensors(record)["x"].numpy()
        assert read.dtype == values.dtype
        assert read.flags.c_contiguous == theirs.numpy().flags.c_contiguous
        assert np.array_equal(read, values)
        assert read.flags.writeable


def test_an_array_over_lent_memory_is_counted_and_read_there_and_copied_for_whoever_asks_for_bytes() -> None:
    theirs, memory = Array(np.ones(3, np.float32)), bytearray(Array(np.ones(3, np.float32)).data)
    lent = LentArray(theirs.dtype, theirs.shape, theirs.stype, memoryview(memory))
    record = ArrayRecord()
    record["x"] = lent
    assert value_bytes(record) == 12
    assert to_tensors(record)["x"].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(BufferError):
        memory.append(0)
    memory[-12:] = bytes(12)
    again = ArrayRecord({"x": lent})["x"]  # as Flower copies records
    memory.append(0)  # nothing is lent any more
    assert lent.data == again.data == bytes(memory[:-1])
    assert lent.numpy().tolist() == [0.0, 0.0, 0.0]


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no array",
        Array(np.ones(5)).data[:-1],
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n") + bytes(8),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n") + bytes(8),
        header("{'descr': '<f4', 'fortran_order': False}\n"),
        header("{" + " " * 20_000 + "}\n"),
    ],
)
def test_bytes_that_are_no_array_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, TypeError, EOFError)):
        to_tensors(ArrayRecord({"x": Array("float32", (5,), "numpy.ndarray", data)}))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (3, 5)])
def test_arrays_are_the_bytes_that_flower_writes_and_reads(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    for own in (values, values.T):
        (array,) = to_record({"a": torch.from_numpy(own)}).values()
        wanted = Array(own)
        assert (array.dtype, array.shape, array.stype, array.data) == (
            wanted.dtype, wanted.shape, wanted.stype, wanted.data,
        )  # fmt: skip
        (tensor,) = to_tensors(ArrayRecord({"a": array})).values()
        assert torch.equal(tensor, torch.from_numpy(own.copy()))
        tensor.zero_()  # what is read belongs to its reader
        assert array.data == wanted.data


def test_an_array_whose_header_lies_is_read_as_its_bytes_say_or_refused() -> None:
    data = Array(np.ones((2, 3), dtype=np.float32)).data
    lying = ArrayRecord({"a": Array("float32", (3, 2), "numpy.ndarray", data)})
    assert to_tensors(lying)["a"].shape == (2, 3)
    for broken in (data[:-1], b"\x00" + data[1:]):
        with pytest.raises(ValueError, match=r".+"):
            to_tensors(ArrayRecord({"a": Array("float32", (2, 3), "numpy.ndarray", broken)}))
