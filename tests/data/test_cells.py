"""Cells, labels and columns of types that other programs write: right, or one line that names them."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft import tasks
from fedpeft.config import DataConfig
from fedpeft.errors import DataError
from tests.data.loading import SourceRows, load_rows

DEEP = "[" * 3000 + "]" * 3000
DIGITS = "9" * 5000


def load(source: Path, **data: Any) -> SourceRows:
    return load_rows(
        DataConfig(source=str(source), **data),
        tasks.find("sequence-classification").columns,
        client_column=None,
        seed=0,
    )


def texts(rows: SourceRows) -> list[str]:
    return [row["text"] for row in sorted([*rows.train, *rows.test], key=lambda row: int(row["row"]))]


def names(rows: SourceRows) -> list[str]:
    found = sorted([*rows.train, *rows.test], key=lambda row: int(row["row"]))
    return [rows.labels[row["label"]] for row in found]


def refused(source: Path, message: str, **data: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(source, **data)
    assert "\n" not in str(caught.value)


def jsonl(path: Path, cell: str, column: str) -> Path:
    held = {"text": '"a"', "label": '"x"', "other": "1", column: cell}
    row = "{" + ", ".join(f'"{name}": {value}' for name, value in held.items()) + "}\n"
    plain = '{"text": "b", "label": "y"}\n{"text": "c", "label": "x"}\n{"text": "d", "label": "y"}\n'
    path.write_text(plain + row, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('"a \\ud83d"', r"half a character \(\\ud83d\) in column 'text'"),
        (DIGITS, "number of 5,000 digits in column 'text'"),
        (DEEP, "list in column 'text'"),
        ("Infinity", "number without bounds .* in column 'text'"),
        ("1e999", "number without bounds"),
        ("NaN", "has no text in column 'text'"),
        ('{"a": 1}', "dict in column 'text'"),
        ('"1", "text": "2"', "has the key 'text' twice"),
    ],
    ids=["surrogate", "digits", "deep", "infinity", "overflow", "nan", "object", "twice"],
)
def test_a_cell_that_is_no_text_is_named_where_it_is_read_and_does_no_harm_elsewhere(
    tmp_path: Path, suffix: str, cell: str, message: str
) -> None:
    path = jsonl(tmp_path / f"rows.{suffix}", cell, "text")
    if suffix == "json":
        path.write_text(f"[{','.join(path.read_text().splitlines())}]")
    refused(path, rf"(row|line) 4 of .*{message}")
    unread = jsonl(tmp_path / "unread.jsonl", cell.replace('"text"', '"other"'), "other")
    assert texts(load(unread)) == ["b", "c", "d", "a"]


def parquet(path: Path, **columns: Any) -> Path:
    held = {"text": pa.array(["a", "b", "c", "d"]), "label": pa.array(["x", "y", "x", "y"])} | columns
    pq.write_table(pa.table(held), path)
    return path


WORDS = pa.array(["x", "y", "x", "y"])


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize(
    "cells",
    [
        WORDS.cast(pa.binary()),
        WORDS.cast(pa.large_binary()),
        WORDS.cast(pa.binary()).cast(pa.binary(1)),
        WORDS.cast(pa.large_string()),
        WORDS.cast(pa.string_view()),
        WORDS.dictionary_encode(),
        WORDS.cast(pa.binary()).dictionary_encode(),
    ],
    ids=lambda cells: str(cells.type).split("<")[0],
)
def test_words_are_the_same_however_parquet_keeps_them(tmp_path: Path, column: str, cells: pa.Array) -> None:
    rows = load(parquet(tmp_path / "rows.parquet", **{column: cells}))
    assert (texts if column == "text" else names)(rows) == ["x", "y", "x", "y"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (pa.array([b"a", b"\xff", b"a", b"b"]), r"row 2 of .* bytes in column '{column}' that are not UTF-8"),
        (pa.array([b"a", b"\xff", b"a", b"b"]).view(pa.string()), "row 2 of .* not UTF-8"),
        (pa.array([datetime.datetime(2020, 1, 1)] * 4), r"column '{column}' of .* holds timestamp\[us\]"),
        (pa.array([datetime.timedelta(1)] * 4), r"holds duration\[us\]"),
        (pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int8())), "holds map"),
        (pa.array([{"a": 1}] * 4), "holds struct"),
    ],
    ids=["bytes", "string", "timestamp", "duration", "map", "struct"],
)
@pytest.mark.parametrize("column", ["text", "label"])
def test_what_is_neither_text_nor_number_is_refused_by_name(
    tmp_path: Path, cells: pa.Array, message: str, column: str
) -> None:
    refused(parquet(tmp_path / "rows.parquet", **{column: cells}), message.replace("{column}", column))


def test_what_another_program_says_of_columns_is_believed_only_if_it_is_so(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet")
    for told in ("{", "[]", '{"info": 3}', '{"info": {"features": {"label": {"dtype": "int8", "_type": "Value"}}}}'):
        pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": told}), path)
        assert names(load(path)) == ["x", "y", "x", "y"]


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path: Path) -> None:
    columns = [pa.array(["a", "b", "c", "d"]), WORDS, WORDS]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns, names=["text", "label", "label"]), path)
    refused(path, "2 columns named 'label'")
    pq.write_table(pa.table([*columns, WORDS], names=["text", "label", "more", "more"]), path)
    assert names(load(path)) == ["x", "y", "x", "y"]


# labels


@pytest.mark.parametrize(
    ("labels", "others"),
    [
        (pa.array([0, 1, 0, 1]), ["0", "1"]),
        (pa.array([0.0, 1.0, 0.0, 1.0]), ["0", "1.0"]),
        (pa.array([decimal.Decimal("0.00"), decimal.Decimal("1.00")] * 2), ["0.0", "1"]),
        (pa.array([False, True, False, True]), ["false", "TRUE"]),
        (pa.array([b"nein", b"ja", b"nein", b"ja"]), ["nein", " ja"]),
        (pa.array(["cafe\u0301", "the", "cafe\u0301", "the"]), ["caf\u00e9", "the"]),
    ],
    ids=["int", "float", "decimal", "bool", "bytes", "accents"],
)
def test_labels_of_two_files_are_the_same_where_people_mean_the_same(
    tmp_path: Path, labels: pa.Array, others: list[str]
) -> None:
    train = parquet(tmp_path / "train.parquet", label=labels)
    test = tmp_path / "test.csv"
    test.write_text("text,label\n" + "".join(f"t,{label}\n" for label in others), encoding="utf-8")
    rows = load(train, test=str(test))
    held = list(rows.train["label"])
    assert list(rows.test["label"]) == held[:2]
    assert held[0] != held[1]


def test_truths_in_two_spellings_are_not_two_classes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "t", "label": value}) + "\n" for value in (True, "true", False)))
    refused(path, "write truths in several ways: False, True, true")
    refused(parquet(tmp_path / "rows.parquet"), "one label in two ways", labels="1,1.0,x,y")


@pytest.mark.parametrize("numbers", [[0.5, 1.0, 4.25, 1.0], [0.5, float("inf"), 0.5, 1.0]])
def test_real_numbers_are_regression_unless_each_is_named_as_a_class(tmp_path: Path, numbers: list[float]) -> None:
    path = parquet(tmp_path / "rows.parquet", label=pa.array(numbers))
    refused(path, r"labels in column 'label' of .* real numbers \(0\.5, 1, .*regression.*data\.labels")
    named = ",".join(map(str, sorted(set(numbers))))
    assert len(load(path, labels=named).labels) == len(set(numbers))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["True", "1", "False", "0"], "truths in several ways: 0, 1, False, True"),
        (['"0,5"', '"1,5"'] * 2, "2 real numbers .*regression"),
    ],
)
def test_truths_beside_numbers_and_decimal_commas_are_no_classes(
    tmp_path: Path, labels: list[str], message: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    refused(path, message)


def test_a_missing_text_that_pandas_wrote_as_a_number_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [1.5, float("nan")], "label": ["x", "y"]}), path)
    refused(path, "row 2 .* has no text")


def test_small_decimals_and_deep_notes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    cells = pa.array([decimal.Decimal("1.5"), decimal.Decimal("2.5")] * 2, pa.decimal32(5, 1))
    held = pa.table({"text": cells, "label": ["x", "y"] * 2})
    pq.write_table(held.replace_schema_metadata({"huggingface": "[" * 99_999}), path)
    assert texts(load(path)) == ["1.5", "2.5"] * 2


def test_an_empty_saved_split_holds_no_rows(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"] * 2, "label": ["x", "y"] * 2})
    datasets.DatasetDict({"train": rows, "test": rows.select([])}).save_to_disk(tmp_path / "saved")
    refused(tmp_path / "saved", "split 'test' of .* holds no rows")
    (tmp_path / "saved" / "train" / "state.json").write_text("[" * 99_999)
    refused(tmp_path / "saved", "cannot be read as a saved dataset")


@pytest.mark.parametrize(
    ("source", "message"), [("", "no rows are named"), ("https://x.org/rows.csv", "no file or folder 'https://x.org")]
)
def test_a_source_that_names_no_file_is_said_whole(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(source=source), tasks.find("sequence-classification").columns, client_column=None, seed=0)
