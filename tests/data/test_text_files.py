"""Plain tables in every dress: separators, packing, encodings, and the layouts of JSON."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft import tasks
from fedpeft.config import DataConfig, nest, resolve
from fedpeft.errors import ConfigError, DataError
from tests.data.loading import load_rows

ROWS = [{"text": f"Käse, {index}", "label": "xy"[index % 2], "note": "z"} for index in range(6)]
HEAD = {"version": 1, "note": "n"}


def load(source: Path, **data: Any) -> list[tuple[str, str]]:
    rows = load_rows(
        DataConfig(source=str(source), **data),
        tasks.find("sequence-classification").columns,
        client_column=None,
        seed=0,
    )
    found = sorted([*rows.train, *rows.test], key=lambda row: int(row["row"]))
    return [(row["text"], rows.labels[row["label"]]) for row in found]


def refused(source: Path, message: str, **data: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(source, **data)
    assert "\n" not in str(caught.value)


def separated(mark: str, end: str = "\n") -> str:
    lines = [mark.join(ROWS[0]), *(mark.join(f'"{cell}"' for cell in row.values()) for row in ROWS)]
    return end.join([*lines, ""])


WHOLE = [(row["text"], row["label"]) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
DRESSES = {
    "comma.csv": separated(","),
    "semicolon.csv": separated(";", "\r\n"),
    "bar.csv": separated("|"),
    "tab.csv": separated("\t", "\r"),
    "tab.tsv": separated("\t"),
    "comma.TSV": separated(","),
    "excel.csv": "sep=;\r\n" + separated(";", "\r\n"),
    "blank.csv": "\n" + separated(";").replace("\n", "\n  \n"),
    "lines.jsonl": LINES,
    "lines.ndjson": LINES.replace("\n", "\n\n"),
    "list.json": json.dumps(ROWS, indent=2),
    "data.json": json.dumps({"data": ROWS}),
    "version.json": json.dumps(HEAD | {"rows": ROWS, "errors": []}, indent=1),
    "pretty.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "columns.json": json.dumps(COLUMNS),
    "pandas.json": json.dumps({name: {str(i): cell for i, cell in enumerate(c)} for name, c in COLUMNS.items()}),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", DRESSES)
def test_rows_are_the_same_in_every_dress(tmp_path: Path, name: str, packed: bool) -> None:
    content = ("\ufeff" + DRESSES[name]).encode()
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(content) if packed else content)  # browsers unpack and leave the name
    assert load(path) == WHOLE
    (tmp_path / "split").mkdir()
    path.rename(tmp_path / "split" / f"train{''.join(path.suffixes)}")
    assert load(tmp_path / "split") == WHOLE


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "latin-1", "gb18030"])
@pytest.mark.parametrize("name", ["semicolon.csv", "list.json", "lines.jsonl"])
def test_a_file_in_another_encoding_is_read_once_that_is_named(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(json.dumps(ROWS, ensure_ascii=False).encode(encoding) if "list" in name else b"")
    if "list" not in name:
        path.write_bytes(DRESSES[name].replace("\\u00e4", "ä").encode(encoding))
    assert load(path, encoding=encoding) == WHOLE
    refused(path, r"[Ss]et data\.encoding")


def test_the_byte_that_an_encoding_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\n" + b"good,x\n" * 20_000 + b"caf\xe9,y\n")
    refused(path, r"not text in utf-8: byte 0xe9 in line 20002 .*Set data\.encoding to .*cp1252")
    path.write_bytes(b"text,label\nb\x81d,y\n")
    refused(path, r"not text in cp1252: byte 0x81 in line 2 .*such as utf-8", encoding="cp1252")


@pytest.mark.parametrize("name", ["utf-9", "base64", "rot13", ""])
def test_only_encodings_of_text_can_be_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.encoding = '{name}' is no encoding of text"):
        resolve([nest({"data.encoding": name})])


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    whole = gzip.compress(DRESSES["comma.csv"].encode())
    path.write_bytes(whole[:-12])
    refused(path, "is no whole gzip file")
    path.write_bytes(whole[:20] + b"\xff" * 9 + whole[29:])
    refused(path, "is no whole gzip file")
    path.write_bytes(gzip.compress(whole))
    refused(path, "packed by gzip twice")


@pytest.mark.parametrize(
    ("written", "right", "wrong"),
    [
        ("utf-8-sig", ["utf-8", "utf-8-sig"], ["cp1252", "latin-1", "ascii", "utf-16-le"]),
        ("utf-16", ["utf-16", "utf-16-le"], ["utf-8", "cp1252", "utf-32"]),
        ("utf-32", ["utf-32", "utf-32-le"], ["utf-8", "utf-16", "latin-1"]),
    ],
)
def test_a_byte_order_mark_is_left_out_or_decides(
    tmp_path: Path, written: str, right: list[str], wrong: list[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(separated(",").encode(written))
    for encoding in right:
        assert load(path, encoding=encoding) == WHOLE
    family = "-".join(written.split("-")[:2])
    for encoding in wrong:
        refused(path, rf"the mark of {family.upper()}\. Set data\.encoding={family}\.$", encoding=encoding)


def test_advice_about_an_encoding_leads_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(separated(",").encode("utf-16")[:-1])
    refused(path, "truncated data", encoding="utf-16")
    path.write_bytes("text,label\né,x\n".encode("utf-16-le"))
    refused(path, "such as utf-16-le or utf-16-be")


def test_columns_by_index_are_put_together_by_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    index = [str(number) for number in range(len(ROWS))]
    turned = {name: dict(zip(index, cells, strict=True)) for name, cells in COLUMNS.items()}
    turned["label"] = dict(reversed(turned["label"].items()))
    path.write_text(json.dumps(turned))
    assert load(path) == WHOLE


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.csv",
            "text;label\na;x\nb;y;z\n",
            r"line 3 .* 3 fields, .* has 2 \(divided by a semicolon\)",
        ),
        ("rows.csv", 'text,label\na,x\n"b,y\nc,x\n', "row that begins in line 3 of .* is malformed"),
        ("rows.csv", '"text,label\n', "row that begins in line 1 of .* is malformed"),
        ("rows.csv", "txt;label\na;x\n", "no column 'text' .*It has: txt, label"),
        ("rows.csv", "t\0e\0x\0t\0,\0l\0\n\0", r"NUL characters.*data\.encoding=utf-16-le"),
        ("rows.json", json.dumps({"train": ROWS, "test": ROWS}), r"several lists of rows \(train, test\)"),
        ("rows.json", '{"text": ["a"], "label": ["x", "y"]}', "differ in length: 'text' 1, 'label' 2"),
        ("rows.json", '{\n "data": [\n {"text": "a"},\n oops]}', "line 4 of .* is not valid JSON"),
        ("rows.json", '{"data": []}', "holds no rows"),
        ("rows.json", '{"data": [[1, 2]]}', r"no rows are found \(it has: data\)"),
        ("rows.json", '{"data": {"text": ["a"], "label": ["x"]}}', r"no rows are found \(it has: data\)"),
        ("rows.json", '{"text": {"0": "a", "1": "b"}, "label": {"1": "x"}}', "'label' of .* has another index"),
        ("rows.json", "{}", "nor any other with a name"),
        ("rows.json", '{"text": "a' + "b" * 9, r"Unterminated string starting at column 10\."),
        ("rows.jsonl", '{"text": "a", "other": ' + "[" * 9999 + "}\n", "line 1 of .* is not valid JSON"),
        ("rows.json", '{"text": "a",\n"other": ' + "[" * 9999 + "}\n", "line .* is not valid JSON"),
        ("rows.csv", '"te\nxt\x1b[31m",label\na,x\n', r"It has: te\\nxt\\x1b\[31m, label\."),
        ("rows.csv", "t" * 10_000 + ",label\na,x\n", r"It has: label, t{57}\.\.\.\. Set"),
        ("rows.csv", "text,label\na,x\ntext,label\nb,y\n", "line 3 of .* repeats the header"),
        ("rows.csv", "text,label\na\n", "line 2 of .* has 1 field, but"),
        ("rows.tsv", 'text\tlabel\n"a" b\tx\n', r"malformed: '\\t' expected"),
        ("rows.json", "3", "line 1 of .* is not a JSON object"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    refused(tmp_path / name, message)


def test_two_files_of_one_split_are_not_chosen_from(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(DRESSES["comma.csv"])
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    refused(tmp_path, r"several files of train rows: train\.csv, train\.jsonl\.gz")


def test_one_object_with_lists_beside_the_wanted_cells_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"text": "a", "label": "x", "spans": [{"from": 1}]}))
    refused(path, "every row of .* has the label 'x'")
