"""Folders of one file per client."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft import tasks
from fedpeft.config import RunConfig, configure
from fedpeft.data.partition import partition
from fedpeft.data.sources import CLIENT, digest, locate, read_rows
from fedpeft.errors import DataError
from fedpeft.tasks.encoding import encode

COLUMNS = tasks.find("causal-lm").columns


def chat(answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": answer}]}


def write(path: Path, *answers: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(chat(answer)) + "\n" for answer in answers))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clients: a file, a file of another format, a folder; two with test rows."""
    base = tmp_path / "clients"
    write(base / "bob.jsonl", "w1", "w2")
    write(base / "bob.test.jsonl", "w3")
    pq.write_table(pa.Table.from_pylist([chat("w4")]), base / "ann.parquet")
    write(base / "cy" / "train.jsonl", "w5", "w6", "w7")
    write(base / "cy" / "test.jsonl", "w8")
    return base


def config_of(folder: Path, **more: object) -> RunConfig:
    return configure({"data.source": str(folder), "partition.by": "file", "data.max_length": 16, **more})


def test_each_file_is_a_client_and_test_rows_know_theirs(folder: Path, tiny_llama: Path) -> None:
    config = config_of(folder, **{"model.name": str(tiny_llama)})
    data = encode(config, tiny_llama)
    divided = partition(config, data.train)
    assert divided.client_ids == ("ann", "bob", "cy")
    assert [len(rows) for rows in divided.indices] == [1, 2, 3]
    assert data.test.clients == ("bob", "cy")
    assert data.train.fingerprint != data.test.fingerprint
    assert np.array_equal(np.concatenate(divided.indices), np.arange(6))


def test_rows_of_a_part_are_hashed_without_those_of_the_other(folder: Path) -> None:
    config = config_of(folder)
    location = locate(folder)
    assert location.test is not None
    before = [digest(place, config.data, COLUMNS) for place in (location.train, location.test)]
    write(folder / "bob.test.jsonl", "w9")
    after = [digest(place, config.data, COLUMNS) for place in (location.train, location.test)]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
    rows = read_rows(
        location.test, config.data, COLUMNS, labels=None, client_column="file", optional=CLIENT
    ).rows.to_list()
    assert [row["client"] for row in rows] == ["bob", "cy"]


def test_a_client_of_two_files_or_of_test_rows_alone_is_refused(folder: Path) -> None:
    (folder / "bob.csv").write_text("messages\n[]\n")
    with pytest.raises(DataError, match=r"several files of client 'bob': bob\.csv, bob\.jsonl"):
        locate(folder)
    (folder / "bob.csv").unlink()
    (folder / "bob.jsonl").unlink()
    with pytest.raises(DataError, match="test rows of 'bob', but none to train on"):
        locate(folder)


def test_a_folder_with_files_named_train_and_test_is_what_it_was(folder: Path) -> None:
    write(folder / "train.jsonl", "w1")
    assert locate(folder).train.kind == "json"


WRONG = {
    "a turn": {"messages": [{"role": "narrator", "content": "w1"}], "topic": "t"},
    "no turns": {"messages": None, "topic": "t"},
    "no domain": {**chat("w1"), "topic": ""},
    "too long": {"messages": [{"role": "user", "content": ""}, *chat("w1")["messages"]], "topic": "t"},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_row_names_its_own_file(tmp_path: Path, tiny_llama: Path, what: str) -> None:
    good = {**chat("w1"), "topic": "t"}
    for name, rows in {"ann": [good] * 3, "bob": [good, WRONG[what]]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path, **{"model.name": str(tiny_llama), "data.domain": "topic"})
    with pytest.raises(DataError, match=f"^row 2 of '{re.escape(str(tmp_path / 'bob.jsonl'))}' "):
        encode(config, tiny_llama)


def test_rows_that_are_left_know_their_place_in_their_own_file(folder: Path, tiny_llama: Path) -> None:
    rows = [chat("w1"), {"messages": None}, chat("w2")]
    (folder / "bob.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(folder, **{"model.name": str(tiny_llama), "data.empty": "skip"})
    for _ in range(2):  # from the cache as well
        train = encode(config, tiny_llama).train
        known = [train.origin.of(at) for at in range(len(train))]
        cy = "cy/train.jsonl"
        assert known == [(1, "ann.parquet"), (1, "bob.jsonl"), (3, "bob.jsonl"), (1, cy), (2, cy), (3, cy)]
        assert train.clients == ("ann", "bob", "bob", "cy", "cy", "cy")
        (caution,) = train.cautions
        assert caution.startswith(f"1 rows of split 'train' of '{folder}' have no token that the loss counts")


def test_files_that_are_no_clients_are_named_and_a_client_without_rows_is_refused(
    folder: Path, tiny_llama: Path
) -> None:
    write(folder / "cy" / "more.jsonl", "w9")
    write(folder / "dee" / "rows.jsonl", "w9")
    (folder / "cy" / "notes.txt").write_text("x")
    data = encode(config_of(folder, **{"model.name": str(tiny_llama)}), tiny_llama)
    (caution,) = data.cautions
    assert caution.startswith(f"2 files in '{folder}' are not read: cy/more.jsonl, dee/rows.jsonl.")
    (folder / "eve.csv").write_text("messages\n")
    with pytest.raises(DataError, match=r"eve\.csv' holds no rows\. Add some, or remove the file\."):
        encode(config_of(folder, **{"model.name": str(tiny_llama)}), tiny_llama)


def test_a_client_whose_rows_are_of_another_layout_is_named(folder: Path, tiny_llama: Path) -> None:
    (folder / "dee.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "w1"}]}) + "\n")
    with pytest.raises(DataError, match=r"dee\.jsonl' has no column 'messages' \(data\.messages\)\. It has: conv"):
        encode(config_of(folder, **{"model.name": str(tiny_llama)}), tiny_llama)
