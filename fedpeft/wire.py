"""What travels between server and clients: an order to train and its answers, and the names under which they travel.

The names are public, since servers and sites of different versions speak to each other: `TrainOrder` and the others are
how this code speaks of them, and nothing else reads a record's keys. What comes from the other side is checked as it is
read, and refused by the name of its key; what an unknown key says is left alone.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from io import BytesIO
from typing import Any, Self

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, MetricRecord, RecordDict
from flwr.common.constant import SType
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.adapters.state import PrivacyClaim, Role, TrainMetrics
from fedpeft.errors import MessageError

# records of a message
ARRAYS_RECORD, CONFIG_RECORD, METRICS_RECORD = "arrays", "config", "metrics"
CONTROL_RECORD = "control"  # of an order, where a method has control variates
# keys of an order's config record
ROUND, NUM_ROUNDS, SCALING, HELD_HASH, RANK, DRAW = "server-round", "num-rounds", "scaling", "held-hash", "rank", "draw"
TRAINED, PERSONAL, KEPT = "trained", "personal", "kept"  # lists of roles
CONTROL_MADE_IN = "control-made-in"  # beside a control variate
ORDER_KEYS = (ROUND, NUM_ROUNDS, SCALING, HELD_HASH, RANK, DRAW, TRAINED, PERSONAL, KEPT, CONTROL_MADE_IN)
CLIENT_ID = "client-id"  # of an identity's config record
# keys of an answer's metric record
NUM_EXAMPLES, STEPS, TRAIN_LOSS, SECONDS = "num-examples", "steps", "train_loss", "seconds"
RATE_SUM, CONTROL_LOST = "rate-sum", "control-lost"
NOISE_MULTIPLIER, SAMPLE_RATE, SPENT_STEPS = "noise-multiplier", "sample-rate", "spent-steps"  # all three or none

FIRST_FORMAT = b"\x93NUMPY\x01\x00"  # of NumPy's, which all but strange types are written in
LONGEST_HEADER = 10_000  # bytes

Records = Mapping[str, Any]


@dataclass(frozen=True)
class TrainOrder:
    """What a server asks of a client in a round.

    Parameters
    ----------
    arrays : flwr.app.ArrayRecord
        What of the adapter the client lacks; clients of a round that lack the same are sent one object.
    server_round, num_rounds : int
        Which round of how many, from 1.
    scaling : float
        What the client multiplies its product of factors with.
    held_hash : str
        Fingerprint of what the client is believed to hold besides; empty for nothing.
    rank : int
        The client's; 0 is the adapter's own.
    draw : int
        Which draw from the run's seed the round begins with, see `fedpeft.strategies.rounds.exchange.Exchange`.
    trained, personal, kept : frozenset of Role
        What the client trains, never sends, and keeps for later rounds.
    settings : mapping of str to int, float or another value of a flwr.app.ConfigRecord
        A method's own, such as those of `fedpeft.adapters.pruning`, and what ``train_config`` passes on.
    control : flwr.app.ArrayRecord, optional
        The server's control variate of each tensor that the client sends back, by the tensor's name; clients of a round
        are sent one object. The client then keeps one of its own, see `fedpeft.clients.control`.
    control_made_in : int
        Which of its own the client is to go on from, by the round that made it; 0 for zero.
    """

    arrays: ArrayRecord
    server_round: int
    num_rounds: int
    scaling: float
    held_hash: str = ""
    rank: int = 0
    draw: int = 0
    trained: frozenset[Role] = frozenset()
    personal: frozenset[Role] = frozenset()
    kept: frozenset[Role] = frozenset()
    settings: Mapping[str, ConfigRecordValues] = field(default_factory=dict)
    control: ArrayRecord | None = None
    control_made_in: int = 0

    def to_record(self) -> RecordDict:
        """Write the order as a message's content, over the very same arrays."""
        content = RecordDict({ARRAYS_RECORD: self.arrays, CONFIG_RECORD: self.config_record()})
        if self.control is not None:
            content[CONTROL_RECORD] = self.control
        return content

    def config_record(self) -> ConfigRecord:
        """Write what the order says besides its arrays."""
        of_control = {} if self.control is None else {CONTROL_MADE_IN: self.control_made_in}
        return ConfigRecord(
            {
                **self.settings,
                **of_control,
                ROUND: self.server_round,
                NUM_ROUNDS: self.num_rounds,
                SCALING: self.scaling,
                HELD_HASH: self.held_hash,
                RANK: self.rank,
                DRAW: self.draw,
                TRAINED: _listed(self.trained),
                PERSONAL: _listed(self.personal),
                KEPT: _listed(self.kept),
            }
        )

    @classmethod
    def from_record(cls, content: RecordDict) -> Self:
        """Read an order.

        Raises
        ------
        MessageError
            A key that is missing, or whose value is none that it may have.
        """
        arrays, config = content.array_records, content.config_records
        if ARRAYS_RECORD not in arrays or CONFIG_RECORD not in config:
            raise MessageError(f"the order lacks '{ARRAYS_RECORD}' or '{CONFIG_RECORD}'")
        entries = config[CONFIG_RECORD]
        return cls(
            arrays[ARRAYS_RECORD],
            server_round=_whole(entries, ROUND, 1),
            num_rounds=_whole(entries, NUM_ROUNDS, 1),
            scaling=_number(entries, SCALING),
            held_hash=_text(entries, HELD_HASH),
            rank=_whole(entries, RANK, 0),
            draw=_whole(entries, DRAW, 0),
            trained=_roles(entries, TRAINED),
            personal=_roles(entries, PERSONAL),
            kept=_roles(entries, KEPT),
            settings={key: value for key, value in entries.items() if key not in ORDER_KEYS},
            control=arrays.get(CONTROL_RECORD),
            control_made_in=_whole(entries, CONTROL_MADE_IN, 0) if CONTROL_RECORD in arrays else 0,
        )


@dataclass(frozen=True)
class TrainAnswer:
    """What a client that has trained sends back.

    Parameters
    ----------
    arrays : flwr.app.ArrayRecord
        What was trained and is not personal. Names, shapes and bytes are the server's to check.
    num_examples : int
        The client's weight: its rows, or 1 where these are nobody's business.
    metrics : TrainMetrics
        What else it says.
    """

    arrays: ArrayRecord
    num_examples: int
    metrics: TrainMetrics = field(default_factory=TrainMetrics)

    def to_record(self) -> RecordDict:
        """Write the answer as a message's content; what is None is left out."""
        metrics, spent = self.metrics, self.metrics.spent
        entries: dict[str, float | None] = {NUM_EXAMPLES: self.num_examples, STEPS: metrics.steps}
        entries |= {TRAIN_LOSS: metrics.loss, SECONDS: metrics.seconds, RATE_SUM: metrics.rate_sum}
        entries |= {CONTROL_LOST: 1 if metrics.control_lost else None}
        if spent is not None:
            noise, rate = spent.noise_multiplier, spent.sample_rate
            entries |= {NOISE_MULTIPLIER: noise, SAMPLE_RATE: rate, SPENT_STEPS: spent.steps}
        told = MetricRecord({key: value for key, value in entries.items() if value is not None})
        return RecordDict({ARRAYS_RECORD: self.arrays, METRICS_RECORD: told})

    @classmethod
    def from_record(cls, content: RecordDict) -> Self:
        """Read an answer.

        Raises
        ------
        MessageError
            No count of rows, or a value that is none that its key may have.
        """
        arrays, metrics = content.array_records, content.metric_records
        if ARRAYS_RECORD not in arrays or METRICS_RECORD not in metrics:
            raise MessageError(f"the reply lacks '{ARRAYS_RECORD}' or '{METRICS_RECORD}'")
        entries = metrics[METRICS_RECORD]
        spent = None
        if any(key in entries for key in (NOISE_MULTIPLIER, SAMPLE_RATE, SPENT_STEPS)):
            noise, rate = (_number(entries, key, finite=False) for key in (NOISE_MULTIPLIER, SAMPLE_RATE))
            spent = PrivacyClaim(noise, rate, _whole(entries, SPENT_STEPS, 0))
        return cls(
            arrays[ARRAYS_RECORD],
            _whole(entries, NUM_EXAMPLES, 1),
            TrainMetrics(
                steps=_whole(entries, STEPS, 0) if STEPS in entries else None,
                loss=_number(entries, TRAIN_LOSS, finite=False) if TRAIN_LOSS in entries else None,
                seconds=_number(entries, SECONDS, finite=False) if SECONDS in entries else None,
                spent=spent,
                rate_sum=_positive(entries, RATE_SUM) if RATE_SUM in entries else None,
                control_lost=CONTROL_LOST in entries,
            ),
        )


class ShortAnswer(StrEnum):
    """What a client answers that has not trained, as a flag of that name."""

    NEEDS_ARRAYS = "needs-arrays"  # it does not hold what the order believes
    BUDGET_SPENT = "privacy-budget-spent"

    def to_record(self) -> RecordDict:
        """Write the answer as a message's content."""
        return RecordDict({CONFIG_RECORD: ConfigRecord({self.value: True})})

    @classmethod
    def from_record(cls, content: RecordDict) -> Self | None:
        """Return which of the short answers this is; None where it is none of them."""
        entries = content.config_records.get(CONFIG_RECORD) or ConfigRecord()
        return next((each for each in cls if entries.get(each.value) is True), None)


@dataclass(frozen=True)
class Identity:
    """Which client a node is, in answer to a query.

    Parameters
    ----------
    client_id : str
        Stable name of the client.
    """

    client_id: str

    def to_record(self) -> RecordDict:
        """Write the answer as a message's content."""
        return RecordDict({CONFIG_RECORD: ConfigRecord({CLIENT_ID: self.client_id})})

    @classmethod
    def from_record(cls, content: RecordDict) -> Self:
        """Read the answer.

        Raises
        ------
        MessageError
            No client id in it, or one that is no text.
        """
        entries = content.config_records.get(CONFIG_RECORD) or ConfigRecord()
        if CLIENT_ID not in entries:
            raise MessageError("no client id in its answer")
        return cls(_text(entries, CLIENT_ID))


def _refuse(entries: Records, key: str, wanted: str) -> MessageError:
    return MessageError(f"{key} = {reprlib.repr(entries.get(key))}, expected {wanted}")


def _whole(entries: Records, key: str, least: int) -> int:
    value = entries.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _refuse(entries, key, f"a whole number of at least {least}")
    return value


def _number(entries: Records, key: str, *, finite: bool = True) -> float:
    value = entries.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or (finite and not math.isfinite(value)):
        raise _refuse(entries, key, "a finite number" if finite else "a number")
    return float(value)


def _positive(entries: Records, key: str) -> float:
    value = _number(entries, key)
    if value <= 0:
        raise _refuse(entries, key, "a number above 0")
    return value


def _text(entries: Records, key: str) -> str:
    value = entries.get(key)
    if not isinstance(value, str):
        raise _refuse(entries, key, "a text")
    return value


def _roles(entries: Records, key: str) -> frozenset[Role]:
    value = entries.get(key)
    if not isinstance(value, list) or any(each not in list(Role) for each in value):
        raise _refuse(entries, key, f"a list of any of {', '.join(Role)}")
    return frozenset(Role(each) for each in value)


def _listed(roles: frozenset[Role]) -> list[str]:
    return sorted(role.value for role in roles)


class LentArray(Array):
    """A Flower Array over memory that others need again: `to_tensors` reads it there, and `data` is a copy.

    Parameters
    ----------
    dtype : str
        Of the values.
    shape : tuple of int
        Of the array.
    stype : str
        How the values are written.
    lent : memoryview
        The bytes.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, lent: memoryview) -> None:
        # Array's own search for what it was given takes longer than a small array takes to copy
        vars(self).update(dtype=dtype, shape=shape, stype=stype, lent=lent)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes, copied when they are first asked for; what was lent is given back then."""
        if "lent" in vars(self):
            vars(self)["own"] = bytes(vars(self).pop("lent"))
        own: bytes = vars(self)["own"]
        return own


def _bytes_of(array: Array) -> Any:
    """Return what holds an array's bytes, without a copy."""
    return vars(array).get("lent") or array.data


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Pack tensors for the wire."""
    record = ArrayRecord()
    for name, tensor in tensors.items():  # given a dict, the record would make each of them once more
        record[name] = _array(tensor.detach().cpu().numpy())
    return record


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack tensors; NumPy's own format, never pickle."""
    return {name: torch.from_numpy(_values(array)) for name, array in record.items()}


def _array(values: NDArray[Any]) -> Array:
    """Return what ``Array(values)`` returns, with one copy of the values in place of three."""
    if not values.flags.c_contiguous:
        return Array(values)
    data = b"".join((_header(values.dtype, values.shape), values.reshape(-1).view(np.uint8).data))
    return Array(str(values.dtype), values.shape, SType.NUMPY, data)


def _values(array: Array) -> NDArray[Any]:
    """Return what ``array.numpy()`` returns, with one copy of the values, and a header of the same bytes read once.

    Raises
    ------
    ValueError, TypeError
        What is no array, in NumPy's words.
    """
    data = _bytes_of(array)
    if array.stype != SType.NUMPY or bytes(data[:8]) != FIRST_FORMAT:
        return array.numpy()
    start = 10 + int.from_bytes(data[8:10], "little")
    if start > LONGEST_HEADER:
        return array.numpy()  # which refuses it
    dtype, shape, in_c_order = _layout(bytes(data[:start]))
    count = math.prod(shape)
    values = np.frombuffer(data, dtype, count, start) if count else np.empty(0, dtype)
    return np.array(values.reshape(shape, order="C" if in_c_order else "F"))


@lru_cache(maxsize=1024)
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return what stands before the values of an array in C order, in NumPy's format."""
    file = BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()


@lru_cache(maxsize=1024)
def _layout(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Return type, shape, and whether the order is C's, of the values that stand behind a header."""
    file = BytesIO(header)
    np.lib.format.read_magic(file)
    shape, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(file, LONGEST_HEADER)
    if dtype.hasobject or any(size < 0 for size in shape):
        raise ValueError(f"no array of numbers has type {dtype} and shape {shape}")
    return dtype, shape, not in_fortran_order


def value_bytes(record: ArrayRecord, counts: Callable[[str], bool] = lambda name: True) -> int:
    """Return the bytes of the values of a record's arrays whose names count, without headers.

    Of an array whose header makes no sense, all its bytes count.
    """
    return sum(_value_bytes(array) for name, array in record.items() if counts(name))


def _value_bytes(array: Array) -> int:
    try:
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    except TypeError:
        size = len(_bytes_of(array))
    return min(max(size, 0), len(_bytes_of(array)))  # what a header claims is not there if the bytes are not
