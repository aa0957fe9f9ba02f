"""Folders of images as people have them, and sources with several splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fedpeft import tasks
from fedpeft.cli import app
from fedpeft.config import DataConfig, configure
from fedpeft.data.formats import hub
from fedpeft.data.readers import cautions
from fedpeft.data.sources import digest, locate
from fedpeft.errors import DataError
from fedpeft.tasks.encoding import encode
from tests.data.loading import SourceRows, load_rows


def load(source: str | Path, task: Any = "image-classification", **data: Any) -> SourceRows:
    return load_rows(DataConfig(source=str(source), **data), tasks.find(task).columns, client_column=None, seed=0)


def rows_of(rows: SourceRows) -> int:
    return len(rows.train) + len(rows.test)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of four images."""
    folder = tmp_path / "pictures"
    for value, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            shade = np.full((6, 5, 3), value * 40 + index, dtype=np.uint8)
            Image.fromarray(shade).save(folder / name / f"{index}.png")
    return folder


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def test_what_systems_and_notebooks_leave_behind_is_neither_class_nor_row(pictures: Path) -> None:
    place, config = locate(pictures).train, DataConfig(source=str(pictures))
    before = digest(place, config, tasks.find("image-classification").columns)
    one = pictures / "cat" / "0.png"
    for name in (".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "__MACOSX/cat/._0.png", "__MACOSX/1.png"):
        copy(one, pictures / name)
    for name in ("._cat.png", "cat/._0.png", ".DS_Store", "cat/Thumbs.db", "desktop.ini"):
        copy(one, pictures / name)
    rows = load(pictures)
    assert (rows.labels, rows_of(rows)) == (("cat", "dog"), 8)
    assert digest(place, config, tasks.find("image-classification").columns) == before


def test_upper_case_nested_and_linked_images_are_rows(pictures: Path) -> None:
    copy(pictures / "cat" / "0.png", pictures / "cat" / "more" / "9.PNG")
    (pictures / "cat" / "link.png").symlink_to(pictures / "cat" / "1.png")
    (pictures / "fox").symlink_to(pictures / "dog")
    (pictures / "cat" / "around").symlink_to(pictures / "cat")
    rows = load(pictures)
    assert (rows.labels, rows_of(rows)) == (("cat", "dog", "fox"), 4 + 2 + 4 + 4)


@pytest.mark.parametrize("suffix", [".heic", ".SVG", ".dng"])
def test_images_of_kinds_that_are_not_read_are_named_and_counted(pictures: Path, suffix: str) -> None:
    for index in range(5):
        (pictures / "dog" / f"new{index}{suffix}").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"holds 5 images .* not read \(dog/new0\{suffix}, .*, \.\.\.\)\. Convert"):
        load(pictures)


@pytest.mark.parametrize("spoilt", [b"", b"<html>404</html>", None, b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_broken_images_are_all_counted_before_one_is_named(
    pictures: Path, tiny_vit: Path, spoilt: bytes | None
) -> None:
    for name in ("cat/2.png", "dog/0.png", "dog/3.png", "dog/1.png"):
        whole = (pictures / name).read_bytes()
        (pictures / name).write_bytes(whole[: len(whole) // 2] if spoilt is None else spoilt)
    config = configure({"model.name": str(tiny_vit), "data.source": str(pictures)})
    with pytest.raises(
        DataError, match=r"row 3 of .* and 3 more hold no image .* \(cat/2\.png, dog/0\.png, dog"
    ) as caught:
        encode(config, tiny_vit)
    assert "\n" not in str(caught.value)


def test_files_and_folders_that_become_no_rows_are_told(
    pictures: Path, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cat" / "notes.txt").write_text("x")
    (pictures / "labels.csv").write_text("x")
    (pictures / "empty").mkdir()
    words = [f"model.name={tiny_vit}", f"data.source={pictures}", "--clients", "2"]
    told = [
        f"files in '{pictures}' that are no images and no rows: 2 (cat/notes.txt, labels.csv)",
        f"folders in '{pictures}' without images, which are no classes: 1 (empty)",
    ]
    for _ in range(2):  # from the cache as well
        app(["partition", *words], standalone_mode=False)
        assert capsys.readouterr().err == "".join(f"warning: {line}\n" for line in told)
    app(["simulate", "--dry-run", "--json", *words], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["notes"] == told


def test_the_task_follows_from_a_folder_of_images(pictures: Path, tmp_path: Path, text_csv: Path) -> None:
    config = configure({"data.source": str(pictures)})
    assert (tasks.named(config), config.data.image) == ("image-classification", "image")
    assert tasks.named(configure({"data.test": str(pictures)})) == "image-classification"
    pictures.rename(tmp_path / "train")
    assert tasks.named(configure({"data.source": str(tmp_path)})) == "image-classification"
    assert tasks.named(configure({"data.source": str(text_csv)})) == "sequence-classification"
    asked = configure({"data.source": str(tmp_path), "data.text": "text"})
    assert tasks.named(asked) == "sequence-classification"
    with pytest.raises(DataError, match=r"no column 'text' .* To classify images set data\.image=image\.$"):
        load(tmp_path, tasks.named(asked))


# splits


LABELLED = {"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}
FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})


def glue() -> datasets.DatasetDict:
    """Return rows as benchmarks publish them: the test split without labels."""
    part = datasets.Dataset.from_dict(LABELLED, features=FEATURES)
    hidden = datasets.Dataset.from_dict({"text": ["e", "f"], "label": [-1, -1]}, features=FEATURES)
    return datasets.DatasetDict(train=part, validation=part.select([3, 2]), test=hidden)


def test_the_error_of_an_unlabelled_test_split_names_one_that_works(tmp_path: Path) -> None:
    glue().save_to_disk(tmp_path / "glue")
    with pytest.raises(DataError, match=r"none of the 2 rows of split 'test' .* has a label") as caught:
        load(tmp_path / "glue", "sequence-classification")
    advised = str(caught.value).rpartition("data.test=")[2].rstrip(".")
    assert advised == f"{tmp_path}/glue:validation"
    rows = load(tmp_path / "glue", "sequence-classification", test=advised)
    assert (rows.train["text"][:], rows.test["text"][:]) == (["a", "b", "c", "d"], ["d", "c"])


def test_a_split_named_behind_a_colon_is_all_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glue().save_to_disk(tmp_path / "my:glue")
    monkeypatch.chdir(tmp_path)
    rows = load("my:glue:train", "sequence-classification")
    assert sorted([*rows.train["text"], *rows.test["text"]]) == ["a", "b", "c", "d"]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.csv").write_text("text,label\na,x\nb,y\nc,x\n")
    (tmp_path / "files" / "validation.csv.gz").write_text("text,label\nv,x\n")
    rows = load("files:train", "sequence-classification", test="files:validation")
    assert (len(rows.train), rows.test["text"][:]) == (3, ["v"])
    config = configure({"data.source": "files:train", "data.test": "files:validation"})
    assert config.data.source == f"{tmp_path}/files:train"
    for name, message in (
        ("files:dev", r"'files' has no split 'dev'\..* Allowed: train, validation"),
        ("files/train.csv:train", "is a file, which has no split"),
        ("nowhere/rows.csv:train", "there is no file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            locate(name)


def test_splits_and_configurations_of_the_hub_are_named_behind_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> datasets.DatasetDict:
        asked.append(names)
        if names == ("owner/several",):
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")
        return glue()

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *names, **options: None)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub.hub_dataset.cache_clear()
    task = "sequence-classification"
    rows = load("owner/rows", task, test="owner/rows:validation")
    assert (rows.test["text"][:], asked) == (["d", "c"], [("owner/rows",)])
    with pytest.raises(DataError, match=r"set data\.test=owner/rows:validation\."):
        load("owner/rows", task)
    rows = load("owner/several:a:train", task)
    assert (rows_of(rows), asked[1:]) == (4, [("owner/several", "a")])
    assert len({digest(locate(f"owner/rows:{part}").train, DataConfig()) for part in ("train", "test")}) == 2
    with pytest.raises(DataError, match=r"\['a', 'b'\]\. Give .* owner/several:CONFIGURATION:train"):
        locate("owner/several")
    with pytest.raises(DataError, match=r"has no split 'valid'\. Did you mean 'validation'\?"):
        locate("owner/rows:valid")
    hub.hub_dataset.cache_clear()


def test_a_link_back_to_all_classes_is_no_class_and_makes_none_another(pictures: Path) -> None:
    (pictures / "cat" / "all").symlink_to(pictures)
    (pictures / "all").symlink_to(pictures)
    rows = load(pictures)
    assert (rows.labels, rows_of(rows)) == (("cat", "dog"), 8)


def test_images_whose_names_are_no_text_are_counted(pictures: Path) -> None:
    (pictures / "cat" / "0.png").rename(pictures / "cat" / "\udcff\udce9.png")
    digest(locate(pictures).train, DataConfig(source=str(pictures)), tasks.find("image-classification").columns)
    with pytest.raises(DataError, match=r"1 images whose names are no text in UTF-8 \(cat/\\udcff\\udce9\.png\)"):
        load(pictures)


def test_splits_have_any_case_and_what_belongs_to_none_is_told(pictures: Path, tmp_path: Path) -> None:
    for split in ("Train", "TEST", "val"):
        for image in pictures.rglob("*.png"):
            copy(image, tmp_path / "divided" / split / image.relative_to(pictures))
    divided = tmp_path / "divided"
    rows = load(divided)
    assert (rows.labels, len(rows.train), len(rows.test)) == (("cat", "dog"), 8, 8)
    told = f"folders of images in '{divided}' that belong to no split and are no rows: 1 (val)"
    assert cautions(locate(divided).train) == (told,)
