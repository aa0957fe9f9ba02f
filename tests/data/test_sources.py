"""Reading rows from every kind of source, and saying what is wrong with them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedpeft import tasks
from fedpeft.config import DataConfig
from fedpeft.data.formats import hub
from fedpeft.data.sources import hold_out, locate
from fedpeft.errors import DataError
from tests.data.loading import SourceRows, load_rows

TEXTS = ["007", "2020-01-01", 'say "x", y', "1.50", "NA", "über\nzwei"]
ROWS: dict[str, list[Any]] = {"text": TEXTS * 5, "label": ["pos", "neg", "pos"] * 10, "site": [3, 10, 2] * 10}


def load(source: Path, task: str = "sequence-classification", client: str | None = None, **data: Any) -> SourceRows:
    return load_rows(DataConfig(source=str(source), **data), tasks.find(task).columns, client_column=client, seed=0)


def every_row(rows: SourceRows) -> list[dict[str, Any]]:
    return sorted([*rows.train, *rows.test], key=lambda row: int(row["row"]))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def save_all_kinds(folder: Path, kind: str) -> Path:
    table = datasets.Dataset.from_dict(ROWS)
    path = folder / kind
    if kind == "rows.csv":
        table.to_csv(path)
    elif kind == "rows.jsonl":
        table.to_json(path, force_ascii=False)
    elif kind == "rows.json":
        path.write_text(json.dumps(table.to_list()))
    elif kind == "rows.parquet":
        table.to_parquet(path)
    elif kind == "selected":
        table.add_column("drop", range(30)).select(range(29, -1, -1)).select(range(29, -1, -1)).save_to_disk(path)
    elif kind == "split":
        datasets.DatasetDict(only=table).save_to_disk(path)
    elif kind == "files":
        path.mkdir()
        table.to_csv(path / "train.csv")
    else:
        table.save_to_disk(path)
    return path


KINDS = ["rows.csv", "rows.jsonl", "rows.json", "rows.parquet", "saved", "selected", "split", "files"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["plain", "with [signs] * and spaces"])
def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path, kind: str, folder: str) -> None:
    (tmp_path / folder).mkdir()
    rows = load(save_all_kinds(tmp_path / folder, kind), domain="site", client="site")
    assert rows.labels == ("neg", "pos")
    found = every_row(rows)
    assert [row["text"] for row in found] == ROWS["text"]
    assert [rows.labels[row["label"]] for row in found] == ROWS["label"]
    assert [row["domain"] for row in found] == [row["client"] for row in found] == [str(site) for site in ROWS["site"]]
    assert [row["row"] for row in found] == list(range(1, 31))


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([10, 9, 2], None, ("2", "9", "10")),
        ([3.0, -0.0, 3.0], None, ("0", "3")),
        ([True, False, True], None, ("False", "True")),
        (["b", " a ", "C"], None, ("C", "a", "b")),
        (["1.0", "1", "2"], None, ("1", "2")),
        ([2, 0, 1], datasets.ClassLabel(names=["z", "y", "x"]), ("z", "y", "x")),
    ],
)
def test_labels_of_any_type_become_names_in_a_natural_order(
    tmp_path: Path, labels: list[Any], feature: Any, names: tuple[str, ...]
) -> None:
    table = datasets.Dataset.from_dict({"text": ["t"] * 30, "label": labels * 10})
    if feature is not None:
        table = table.cast_column("label", feature)
    table.to_parquet(tmp_path / "rows.parquet")
    rows = load(tmp_path / "rows.parquet")
    assert rows.labels == names

    def name(label: Any) -> str:
        if feature is not None:
            return str(feature.names[label])
        return f"{label + 0:g}" if isinstance(label, float) else str(label).strip().removesuffix(".0")

    assert [names[row["label"]] for row in every_row(rows)] == [name(label) for label in labels * 10]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_numbers_written_as_floats_have_the_same_name_in_every_text_format(tmp_path: Path, suffix: str) -> None:
    table = datasets.Dataset.from_dict({"text": ["t"] * 4, "label": [1.0, 0.0, 25.0, 1.0]})
    path = tmp_path / f"rows.{suffix}"
    _ = table.to_csv(path) if suffix == "csv" else table.to_json(path)
    assert load(path).labels == ("0", "1", "25")


def test_configured_labels_fix_order_and_set(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label\na,x\nb,y\nc,x\nd,y\n")
    rows = load(path, labels="y,z,x")
    assert rows.labels == ("y", "z", "x")
    assert [row["label"] for row in every_row(rows)] == [2, 0, 2, 0]
    with pytest.raises(DataError, match=r"row 2 of .* has the label 'y'.*x, w"):
        load(path, labels="x,w")


def test_text_pairs_and_prompts_are_read_from_the_columns_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "q,a,l\n1,2,0\n3,4,1\n5,6,0\n7,8,1\n")
    pairs = load(path, text="q", text_pair="a", label="l")
    assert [(row["text"], row["text_pair"]) for row in every_row(pairs)] == [
        ("1", "2"),
        ("3", "4"),
        ("5", "6"),
        ("7", "8"),
    ]
    causal = load(path, "causal-lm", prompt="q", completion="a")
    assert causal.labels == ()
    said = [json.loads(row["conversation"])["messages"] for row in every_row(causal)]
    assert [tuple(turn["content"] for turn in turns) for turns in said] == [
        ("1", "2"), ("3", "4"), ("5", "6"), ("7", "8"),
    ]  # fmt: skip
    assert "label" not in causal.train.column_names


# test rows


def test_a_test_file_is_used_before_the_sources_own_split(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    datasets.DatasetDict(train=part, validation=part, test=part.select([1])).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved").test["text"][:] == ["b"]
    datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "valid")
    assert load(tmp_path / "valid").test["text"][:] == ["a", "b"]
    other = write(tmp_path / "other.csv", "text,label\nc,y\n")
    rows = load(tmp_path / "saved", test=str(other))
    assert (rows.train["text"][:], rows.test["text"][:], rows.test["label"][:]) == (["a", "b"], ["c"], [1])


def test_a_label_that_only_test_rows_have_is_refused_by_name(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label\na,x\nb,y\n")
    test = write(tmp_path / "test.csv", "text,label\na,x\nb,z\n")
    with pytest.raises(DataError, match=r"row 2 of '.*test\.csv' has the label 'z'.*training rows.*x, y.*data\.labels"):
        load(train, test=str(test))


def test_the_test_split_needs_no_client_column(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label,who\na,x,1\nb,y,2\n")
    test = write(tmp_path / "test.csv", "text,label\na,x\n")
    rows = load(train, client="who", test=str(test))
    assert rows.train["client"][:] == ["1", "2"]
    assert "client" not in rows.test.column_names


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 3),
)
def test_holding_out_takes_the_same_share_of_each_label_and_leaves_none_without_training_rows(
    labels: list[int], fraction: float, seed: int
) -> None:
    ids = np.array(labels)
    if len(set(labels)) == len(labels):
        with pytest.raises(DataError, match="too few"):
            hold_out(ids, len(ids), fraction, seed)
        return
    kept, held = hold_out(ids, len(ids), fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(ids)))
    assert len(held) > 0
    sizes = {label: int((ids[held] == label).sum()) for label in set(labels)}
    wanted = {label: min(int(fraction * labels.count(label) + 0.5), labels.count(label) - 1) for label in sizes}
    assert sizes == wanted or (sum(wanted.values()) == 0 and sum(sizes.values()) == 1)
    again = hold_out(ids, len(ids), fraction, seed)
    assert np.array_equal(held, again[1])


def test_another_seed_holds_out_other_rows() -> None:
    assert not np.array_equal(hold_out(None, 100, 0.2, 0)[1], hold_out(None, 100, 0.2, 1)[1])
    assert len(hold_out(None, 100, 0.2, 0)[1]) == 20


# images


def picture(value: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.full((6, 5, 3), value, dtype=np.uint8)).convert(mode)


def class_folders(folder: Path, names: tuple[str, ...]) -> Path:
    for value, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            picture(value * 40 + index).save(folder / name / f"{index}.png")
    return folder


def test_an_image_folder_has_one_label_per_sub_folder(tmp_path: Path) -> None:
    rows = load(class_folders(tmp_path / "images", ("10", "9", "2")), "image-classification")
    assert rows.labels == ("2", "9", "10")
    shades = {rows.labels[row["label"]]: row["image"].getpixel((0, 0))[0] // 40 for row in every_row(rows)}
    assert shades == {"10": 0, "9": 1, "2": 2}


def test_an_image_folder_may_be_divided_into_train_and_test(tmp_path: Path) -> None:
    class_folders(tmp_path / "images" / "train", ("a", "b"))
    class_folders(tmp_path / "images" / "test", ("a", "b"))
    rows = load(tmp_path / "images", "image-classification")
    assert (len(rows.train), len(rows.test), rows.labels) == (8, 8, ("a", "b"))


def test_an_image_folder_may_be_named_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path / "images", ("a", "b"))
    monkeypatch.chdir(tmp_path)
    for source in (Path("images"), Path("..") / tmp_path.name / "images", tmp_path / "images"):
        rows = load(source, "image-classification")
        assert (len(rows.train) + len(rows.test), rows.labels) == (8, ("a", "b"))
        assert {row["image"].size for row in every_row(rows)} == {(5, 6)}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load(class_folders(tmp_path / "images", ("train", "bus")), "image-classification").labels == ("bus", "train")


@pytest.mark.parametrize("kind", ["paths", "bytes", "feature"])
def test_images_may_be_paths_bytes_or_stored_images(tmp_path: Path, kind: str) -> None:
    class_folders(tmp_path / "images", ("a", "b"))
    paths = sorted((tmp_path / "images").rglob("*.png"))
    labels = [path.parent.name for path in paths]
    if kind == "paths":
        lines = [f"{path.relative_to(tmp_path)},{label}" for path, label in zip(paths, labels, strict=True)]
        source = write(tmp_path / "rows.csv", "\n".join(["pic,label", *lines]))
    else:
        table = datasets.Dataset.from_dict({"pic": [path.read_bytes() for path in paths], "label": labels})
        source = tmp_path / "rows.parquet"
        (table if kind == "bytes" else table.cast_column("pic", datasets.Image())).to_parquet(source)
    found = every_row(load(source, "image-classification", image="pic"))
    assert [row["image"].getpixel((0, 0))[0] for row in found] == [0, 1, 2, 3, 40, 41, 42, 43]


# errors


CSV_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("", {}, r"'.*rows\.csv' is empty"),
    ("text,label\n", {}, r"'.*rows\.csv' holds no rows"),
    ("txt,label,id\na,x,1\n", {}, r"no column 'text' \(data\.text\)\. It has: txt,"),
    ("text,label\na,x\n", {"domain": "site"}, r"no column 'site' \(data\.domain\)"),
    ("text,label\na,x\nb,x\n", {}, r"every row .* label 'x' in column 'label'"),
    ("text,label\na,x\n  ,y\n,y\n", {}, r"row 2 of .*\(and 1 more\) has no text in column 'text'"),
    ("text,label\na,x\nb, \n", {}, r"row 2 of .* has no label in column 'label'"),
    ("text,label,d\na,x,1\nb,y,\n", {"domain": "d"}, r"row 2 of .* has no value in column 'd'"),
    ("text,label\na,x\nb,y,z\n", {}, r"line 3 of .* has 3 fields, but the header has 2"),
    ("text,label\na,x\nb\n", {}, r"line 3 of .* has 1 field,"),
    ('text,label\na,x\n"b,y\n', {}, r"line 3 of .* is malformed"),
    ("text,text,label\na,x,b\n", {}, r"2 columns named 'text'"),
    ("text,label\na,x\n", {"labels": "x,y"}, r"1 rows are too few to hold out"),
]


@pytest.mark.parametrize(("content", "data", "message"), CSV_ERRORS)
def test_what_is_wrong_with_a_csv_file_is_said_in_one_line(
    tmp_path: Path, content: str, data: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "rows.csv", content)
    with pytest.raises(DataError, match=message) as caught:
        load(path, **data)
    assert "\n" not in str(caught.value)


JSON_ERRORS = [
    ("", r"holds no rows"),
    ('{"text": "a", "label": 1}\n{"text": \n', r"line 2 of .* is not valid JSON"),
    ('[{"text": "a", "label": 1},\n oops]', r"line 2 of .* is not valid JSON"),
    ('{"text": "a", "label": 1}\n[1]\n', r"line 2 of .* is not a JSON object"),
    ('{"text": "a", "label": 1}\n{"text": ["b"], "label": 2}\n', r"row 2 of .* holds a list in column 'text'"),
    ('{"text": "a", "label": 1}\n{"label": 2}\n', r"row 2 of .* has no text"),
    ('{"txt": "a", "label": 1}\n{"label": 2}\n', r"no column 'text'.*It has: txt, label"),
]


@pytest.mark.parametrize(("content", "message"), JSON_ERRORS)
def test_what_is_wrong_with_a_json_file_is_said_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def binary(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def saved_then_broken(path: Path) -> Path:
    datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]}).save_to_disk(path)
    next(path.glob("*.arrow")).write_bytes(b"broken")
    return path


def empty_folder(path: Path) -> Path:
    path.mkdir()
    return path


def unnamed_splits(path: Path) -> Path:
    part = datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]})
    datasets.DatasetDict(one=part, two=part).save_to_disk(path)
    return path


def lists(path: Path) -> Path:
    datasets.Dataset.from_dict({"text": [["a"]], "label": ["x"]}).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "rows.csv",
            binary(b"text,label\n\xff\xfe,x\n"),
            r"byte 0xff in line 2 .*Set data\.encoding",
        ),
        ("rows.parquet", binary(b"no parquet"), "cannot be read as Parquet"),
        ("rows.xlsx", binary(b""), r"suffix is .\.xlsx., allowed are \.csv, \.tsv, \.json"),
        ("saved", saved_then_broken, "cannot be read as a saved dataset"),
        ("folder", empty_folder, r"of no kind that is read \(it holds nothing\)"),
        ("splits", unnamed_splits, "has the splits one, two, but none is named 'train'"),
        ("rows.parquet", lists, "column 'text' of .* holds list"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, name: str, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(make(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_image_rows_are_checked_too(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "image,label\nno.png,x\n")
    with pytest.raises(DataError, match=r"row 1 of .* names the image '.*no\.png'"):
        load(path, "image-classification")
    folder = class_folders(tmp_path / "images", ("a", "b"))
    picture(0).save(folder / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png' lies outside every class folder"):
        load(folder, "image-classification")
    table = datasets.Dataset.from_dict({"image": [1, 2], "label": ["x", "y"]})
    table.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"column 'image' of .* holds int64"):
        load(tmp_path / "rows.parquet", "image-classification")


# hub ids


@pytest.mark.parametrize("name", ["rows.csv", "./rows", "/no/rows", "a/b/c", "data/rows.jsonl", "../rows", "a b"])
def test_a_mistyped_path_is_never_asked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hub_dataset", lambda name: pytest.fail(f"asked the hub for {name}"))
    with pytest.raises(DataError, match="there is no file or folder"):
        locate(name)


@pytest.mark.parametrize("name", ["imdb", "owner/data-v1.5", "owner/rows.v2"])
def test_a_plain_name_is_asked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    asked = []

    def answer(name: str) -> datasets.DatasetDict:
        asked.append(name)
        return datasets.DatasetDict(train=part, test=part)

    monkeypatch.setattr(hub, "hub_dataset", answer)
    rows = load_rows(DataConfig(source=name), tasks.find("sequence-classification").columns, client_column=None, seed=0)
    assert set(asked) == {name}
    assert (len(rows.train), len(rows.test)) == (2, 2)


def test_without_network_the_library_is_kept_from_trying_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise httpx.ConnectError("no network")

    offline = []

    def load_dataset(name: str) -> None:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="'owner/rows' is neither a file or folder here, nor can the hub be reached"):
        locate("owner/rows")
    assert offline == [True]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_no_source_at_all_says_what_to_give() -> None:
    with pytest.raises(DataError, match=r"Give data\.source"):
        locate(None)


def test_a_long_text_is_no_error(tmp_path: Path) -> None:
    buffer = io.StringIO()
    buffer.write(f"text,label\n{'a ' * 100_000},x\nb,y\nc,x\nd,y\n")
    rows = load(write(tmp_path / "rows.csv", buffer.getvalue()))
    assert max(len(row["text"]) for row in every_row(rows)) == 200_000
