"""How records pass between processes, or between two parties in one: array bytes are copied once or not at all."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message

from fedpeft.clients.verdicts import Verdict
from fedpeft.runs.machine import Footprint, footprint
from fedpeft.simulations.grids.base import Answer, Cause
from fedpeft.wire import LentArray

if TYPE_CHECKING:
    from ray import ObjectRef

Value = TypeVar("Value")
SMALL = 1 << 16  # bytes that are copied sooner than they are looked after


@dataclass(frozen=True)
class PackedArrays:
    """An ArrayRecord on its way to another process.

    Its bytes travel outside the pickle stream (PEP 574): Ray writes them to its object store from where they are, and
    the receiver sees them there until `unpack`.
    """

    headers: tuple[tuple[str, str, tuple[int, ...], str], ...]  # name, dtype, shape, serialisation
    data: tuple[Any, ...]  # PickleBuffer here, and what holds the bytes there

    @classmethod
    def of(cls, record: ArrayRecord) -> PackedArrays:
        """Pack without copying."""
        return cls(
            tuple((name, array.dtype, tuple(array.shape), array.stype) for name, array in record.items()),
            tuple(PickleBuffer(array.data) for array in record.values()),
        )

    def unpack(self, *, copied: bool = True) -> ArrayRecord:
        """Make the record, of bytes of this process, or where they are many of a view of them; see `settle`."""
        record = ArrayRecord()
        for (name, dtype, shape, stype), data in zip(self.headers, self.data, strict=True):
            view = memoryview(data)
            if copied or view.nbytes < SMALL:
                record[name] = Array(dtype, shape, stype, bytes(view))
            else:
                record[name] = LentArray(dtype, shape, stype, view)
        return record


PackedRecords = Mapping[str, PackedArrays | ConfigRecord | MetricRecord]


def pack(records: RecordDict) -> PackedRecords:
    """Make records ready for another process."""
    return {
        name: PackedArrays.of(record) if isinstance(record, ArrayRecord) else record for name, record in records.items()
    }


def unpack(packed: PackedRecords, *, copied: bool = True) -> RecordDict:
    """Undo `pack`; see `PackedArrays.unpack`."""
    return RecordDict(
        {
            name: record.unpack(copied=copied) if isinstance(record, PackedArrays) else record
            for name, record in packed.items()
        }
    )


def settle(records: RecordDict) -> None:
    """Copy to this process what is still a view of Ray's store, where it would take the place of others for long."""
    for record in records.array_records.values():
        for array in record.values():
            _ = array.data  # see `LentArray`


def duplicate(records: RecordDict) -> RecordDict:
    """Return records that can be changed without changing these; array bytes, which cannot change, are shared."""
    return RecordDict(
        {
            name: duplicate_arrays(record) if isinstance(record, ArrayRecord) else copy.deepcopy(record)
            for name, record in records.items()
        }
    )


def duplicate_arrays(record: ArrayRecord) -> ArrayRecord:
    """Return an equal record over the same bytes."""
    return ArrayRecord(dict(record))


@dataclass(frozen=True)
class Parcel:
    """A message and its client's context on their way to a worker.

    Parameters
    ----------
    metadata : Metadata
        The message's.
    records : mapping
        The message's records in order; in place of each ArrayRecord a reference to its `PackedArrays` in Ray's store.
    context : Context
        The client's, without state.
    state : PackedRecords
        The client's state.
    verdict : Verdict or None
        What the driver decided about the message.
    """

    metadata: Metadata
    records: Mapping[str, ObjectRef | ConfigRecord | MetricRecord]
    context: Context
    state: PackedRecords
    verdict: Verdict | None

    @classmethod
    def of(
        cls, message: Message, context: Context, verdict: Verdict | None, store: Callable[[ArrayRecord], ObjectRef]
    ) -> Parcel:
        """Pack; `store` puts arrays into Ray's store."""
        stateless = copy.copy(context)
        stateless.state = RecordDict()
        records = {
            name: store(record) if isinstance(record, ArrayRecord) else record
            for name, record in message.content.items()
        }
        return cls(message.metadata, records, stateless, pack(context.state), verdict)

    def open(self, fetch: Callable[[ObjectRef], ArrayRecord]) -> tuple[Message, Context]:
        """Unpack; `fetch` gets arrays from Ray's store."""
        content = RecordDict(
            {
                name: record if isinstance(record, ConfigRecord | MetricRecord) else fetch(record)
                for name, record in self.records.items()
            }
        )
        self.context.state = unpack(self.state)
        return make_message(self.metadata, content), self.context


@dataclass(frozen=True)
class ParcelledAnswer:
    """A reply and its client's state on their way back; the state only where the reply is no error.

    With them goes what the worker has needed of its machine so far.
    """

    metadata: Metadata
    content: PackedRecords | Error
    state: PackedRecords | None
    trace: str | None = None
    place: str | None = None
    cause: Cause | None = None
    seconds: float = 0.0
    footprint: Footprint = field(default_factory=footprint)

    @classmethod
    def of(cls, answer: Answer, state: RecordDict) -> ParcelledAnswer:
        """Pack."""
        reply = answer.reply
        if reply.has_error():
            return cls(reply.metadata, reply.error, None, answer.trace, answer.place, answer.cause)
        return cls(reply.metadata, pack(reply.content), pack(state), seconds=answer.seconds)

    @property
    def num_bytes(self) -> int:
        """Bytes of the reply's arrays."""
        records = [] if isinstance(self.content, Error) else list(self.content.values())
        return sum(memoryview(d).nbytes for each in records if isinstance(each, PackedArrays) for d in each.data)

    def open(self) -> tuple[Answer, RecordDict | None]:
        """Unpack; the reply's large arrays are views of Ray's store, see `settle`."""
        if isinstance(self.content, Error):
            reply = make_message(self.metadata, error=self.content)
            return Answer(reply, self.trace, self.place, self.cause), None
        reply = make_message(self.metadata, unpack(self.content, copied=False))
        return Answer(reply, seconds=self.seconds), None if self.state is None else unpack(self.state)


class _ObjectKey:
    """An object as a key that equals only itself; it is held, so that its id is not given to another."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ObjectKey) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


Contents = tuple[tuple[str, str, tuple[int, ...], str, _ObjectKey], ...]


def contents(record: ArrayRecord) -> Contents:
    """Return a key that tells what is in a record without reading it.

    Bytes objects cannot change, hence equal keys mean equal arrays, even where the record itself was changed meanwhile.
    """
    return tuple(
        (name, array.dtype, tuple(array.shape), array.stype, _ObjectKey(array.data)) for name, array in record.items()
    )


class Newest(Generic[Value]):
    """A mapping that keeps the entries used last.

    Parameters
    ----------
    size : int
        How many to keep.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """Return the value of a key, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, value: Value) -> Value:
        """Keep a value, and drop the one that was not used for longest if there are too many."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return value


class SharedRecords:
    """The one ArrayRecord object that all messages with the same arrays get: a client may know it by identity.

    Parameters
    ----------
    size : int
        How many different records to keep.
    """

    def __init__(self, size: int = 4) -> None:
        self._kept: Newest[tuple[Contents, ArrayRecord]] = Newest(size)

    def get(self, key: Hashable, make: Callable[[], ArrayRecord]) -> ArrayRecord:
        """Return the record of a key: the object returned last time unless someone has changed it, else a new one."""
        kept = self._kept.get(key)
        if kept is not None and contents(kept[1]) == kept[0]:
            return kept[1]
        record = make()
        self._kept.put(key, (contents(record), record))
        return record
