from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpeft.errors import RunDirectoryError
from fedpeft.simulations.contexts import Contexts, from_bytes, to_bytes
from fedpeft.simulations.grids.inline import InlineGrid

CLIENTS = ["ann", "b/../ob", "7"]


def make(folder: Path) -> Contexts:
    return Contexts(CLIENTS, {"rate": 0.5}, {"trust": False}, folder)


def state(value: float, record: str = "own") -> RecordDict:
    return RecordDict({record: ArrayRecord({"layer.A": Array(np.full((2, 3), value, np.float32))})})


def value(contexts: Mapping[int, object], node: int) -> float | None:
    kept = contexts[node].state  # type: ignore[attr-defined]
    return float(kept.array_records["own"]["layer.A"].numpy()[0, 0]) if "own" in kept else None


def files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def test_every_look_makes_a_context_and_a_change_in_one_reaches_nobody(tmp_path: Path) -> None:
    contexts = make(tmp_path)
    first = contexts[2]
    assert (first.node_id, first.node_config["partition-id"], first.run_config["rate"]) == (2, 1, 0.5)
    first.node_config["partition-id"], first.run_config["rate"], first.state["own"] = 9, 0.1, state(1.0)["own"]
    assert contexts[2].node_config == {"partition-id": 1, "num-partitions": 3, "trust": False}
    assert (contexts[2].run_config["rate"], len(contexts[2].state)) == (0.5, 0)
    assert (sorted(contexts), 0 in contexts, 3 in contexts, 4 in contexts) == ([1, 2, 3], False, True, False)
    with pytest.raises(KeyError):
        contexts[4]


def test_a_state_comes_back_from_its_bytes_whole_and_in_order() -> None:
    arrays = {
        "z": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.zeros((0, 4), np.float64),
        "half": np.float16([1.5]),
        "one": np.array(3.5),
    }
    whole = RecordDict(
        {
            "told": MetricRecord({"loss": 0.1, "counts": [1, 2]}),
            "own": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "said": ConfigRecord({"name": "x", "on": True, "rates": [0.5, float("inf")]}),
        }
    )
    again = from_bytes(to_bytes(whole))
    assert list(again) == ["told", "own", "said"]
    assert to_bytes(again) == to_bytes(whole)
    assert dict(again["told"]) == dict(whole["told"])
    assert dict(again["said"]) == dict(whole["said"])
    assert list(again.array_records["own"]) == list(arrays)
    for name, array in arrays.items():
        found = again.array_records["own"][name].numpy()
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


def test_only_what_clients_keep_is_on_disk_and_one_version_of_it(tmp_path: Path) -> None:
    contexts = make(tmp_path)
    contexts.keep(1, RecordDict())
    assert files(tmp_path) == 0
    for number in (1.0, 2.0, 2.0):
        contexts.keep(2, state(number))
        assert (files(tmp_path), value(contexts, 2), value(contexts, 1)) == (1, number, None)
    contexts.keep(2, RecordDict())
    assert (files(tmp_path), value(contexts, 2)) == (0, None)


def test_what_a_snapshot_names_stays_until_it_is_forgotten_and_is_gone_back_to(tmp_path: Path) -> None:
    contexts = make(tmp_path)
    contexts.keep(2, state(1.0))
    first = contexts.snapshot()
    assert list(first) == ["b/../ob"]
    contexts.keep(2, state(2.0))
    contexts.keep(3, state(2.0))
    second = contexts.snapshot()
    contexts.keep(2, state(3.0))  # and the process is killed
    assert files(tmp_path) == 4
    other = make(tmp_path)
    other.restore(first)
    assert (value(other, 2), value(other, 3)) == (1.0, None)
    other.restore(second)
    assert (value(other, 2), value(other, 3)) == (2.0, 2.0)
    other.keep(2, state(4.0))
    other.forget([second])
    assert files(tmp_path) == 3  # 2.0 twice, and 4.0
    other.forget([])
    assert files(tmp_path) == 2
    assert (value(other, 2), value(other, 3)) == (4.0, 2.0)
    with pytest.raises(RunDirectoryError, match="cannot read what client b"):
        make(tmp_path).restore(first)


def test_a_state_that_comes_again_is_not_removed_with_its_earlier_version(tmp_path: Path) -> None:
    contexts = make(tmp_path)
    contexts.keep(1, state(1.0))
    contexts.snapshot()
    contexts.keep(1, state(2.0))
    contexts.keep(1, state(1.0))
    contexts.forget([])
    assert value(contexts, 1) == 1.0
    assert files(tmp_path) == 1


def test_a_damaged_state_is_found_and_a_stranger_s_refused(tmp_path: Path) -> None:
    contexts = make(tmp_path)
    contexts.keep(1, state(1.0))
    snapshot = contexts.snapshot()
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(RunDirectoryError, match="client ann keeps is damaged"):
        make(tmp_path).restore(snapshot)
    with pytest.raises(RunDirectoryError, match="client zoe"):
        contexts.restore({"zoe": "0" * 64})
    assert contexts.snapshot() == snapshot  # nothing has changed
    for alien in (b"", b"x" * 99, (2).to_bytes(8, "little") + b"{}", (7).to_bytes(8, "little") + b'{"a":1}'):
        name = hashlib.sha256(alien).hexdigest()
        path.with_name(f"{name}.safetensors").write_bytes(alien)
        with pytest.raises(RunDirectoryError, match=r"client ann keeps is no state of a client: .*safetensors"):
            make(tmp_path).restore({"ann": name})
    for strange in ("../../other", 7, None):
        with pytest.raises(RunDirectoryError, match="client ann keeps has no name of ours"):
            make(tmp_path).restore({"ann": strange})  # type: ignore[dict-item]


def test_a_file_that_is_no_version_is_never_removed(tmp_path: Path) -> None:
    contexts = make(tmp_path)
    contexts.keep(1, state(1.0))
    (mine,) = tmp_path.rglob("*.safetensors")
    theirs = mine.with_name("model.safetensors")
    theirs.write_text("theirs")
    contexts.restore({})
    contexts.forget([])
    assert (mine.exists(), theirs.exists()) == (False, True)


def test_what_a_snapshot_names_is_on_the_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_sync, synced = os.fsync, list[str]()

    def noted(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        true_sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    contexts = make(tmp_path)
    contexts.keep(1, state(1.0))
    assert [Path(name).suffix for name in synced] == [".partial"]
    contexts.snapshot()
    assert set(synced[1:]) == {"..", ".", "ann", "ann/state"}
    contexts.snapshot()
    assert len(synced) == 5


def test_a_full_disk_is_said_in_one_line_and_the_version_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = make(tmp_path)
    contexts.keep(1, state(1.0))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match=r"client ann keeps into .*: No space left on device"):
        contexts.keep(1, state(2.0))
    assert value(contexts, 1) == 1.0
    assert files(tmp_path) == 1


def test_a_record_of_all_clients_is_read_client_by_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = make(tmp_path)
    contexts.keep(3, state(3.0))
    contexts.keep(1, state(1.0))
    contexts.keep(2, state(2.0, "other"))
    own = contexts.records("own")
    assert (list(own), len(own), "b/../ob" in own, bool(contexts.records("none"))) == (["ann", "7"], 2, False, False)
    read: list[bytes] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(b"") or whole(path))  # type: ignore[func-returns-value]
    for count, (client, tensors) in enumerate(own.items(), 1):
        assert len(read) == count
        assert torch.equal(tensors["layer.A"], torch.full((2, 3), {"ann": 1.0, "7": 3.0}[client]))


def test_a_grid_keeps_states_there_where_the_client_did_not_raise(
    tmp_path: Path, make_message: Callable[..., Message]
) -> None:
    contexts = make(tmp_path)
    grid = InlineGrid("simulated_clients:app", contexts)
    replies = list(grid.send_and_receive(make_message(2, "train.count", fail=fail) for fail in (0, 0, 1)))
    assert [reply.has_error() for reply in replies] == [False, False, True]
    assert contexts[2].state.array_records["kept"]["n"].numpy().tolist() == [2.0]
    assert len(contexts[1].state) == 0
    assert files(tmp_path) == 1
