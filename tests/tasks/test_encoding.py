"""The cache of encoded rows, a site's own rows, and folders that cannot encode."""

from __future__ import annotations

import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.errors import DataError, ModelError
from fedpeft.tasks import encoding
from fedpeft.tasks.encoding import encode, encode_rows
from tests.tasks.rows import MINILM, configure, write_csv

# the cache


def test_rows_are_tokenised_once_whatever_the_seed(rows_csv: Path, tokenised: list[int]) -> None:
    first = encode(configure(rows_csv), MINILM)
    again = encode(configure(rows_csv), MINILM)
    other = encode(configure(rows_csv, run__seed=1, data__test_fraction=0.5), MINILM)
    assert tokenised == [30]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.train.batch(range(9))["input_ids"], again.train.batch(range(9))["input_ids"])


@pytest.mark.parametrize("change", ["row", "length", "labels", "tokenizer", "domain"])
def test_whatever_tensors_depend_on_makes_a_new_entry(
    tmp_path: Path, rows_csv: Path, tokenised: list[int], change: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MINILM, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    before = encode(configure(rows_csv), folder)
    keys: dict[str, Any] = {}
    if change == "row":
        rows_csv.write_text(rows_csv.read_text().replace("Third!", "Fourth!"))
    elif change == "length":
        keys = {"data__max_length": 5}
    elif change == "labels":
        keys = {"data__labels": "yes,no,maybe"}
    elif change == "domain":
        keys = {"data__domain": "place"}
    else:
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(saved | {"do_lower_case": False}))
    after = encode(configure(rows_csv, **keys), folder)
    assert tokenised == [30, 30]
    assert before.fingerprint != after.fingerprint
    if change == "labels":
        assert after.labels == ("yes", "no", "maybe")


def test_other_test_rows_leave_the_training_rows_entry_alone(
    tmp_path: Path, rows_csv: Path, tokenised: list[int]
) -> None:
    test = write_csv(tmp_path / "test.csv", {"text": ["one", "two"], "label": ["no", "yes"]})
    encode(configure(rows_csv), MINILM)
    data = encode(configure(rows_csv, data__test=str(test)), MINILM)
    assert tokenised == [30, 2]
    assert data.test.labels is not None
    assert [data.labels[label] for label in data.test.labels] == ["no", "yes"]
    assert len(data.train) == 30


def test_a_damaged_entry_is_made_again(rows_csv: Path, tokenised: list[int], empty_cache: Path) -> None:
    before = encode(configure(rows_csv), MINILM).fingerprint
    (stored,) = empty_cache.glob("encoded/*/rows.safetensors")
    stored.write_bytes(stored.read_bytes()[:-7])
    assert encode(configure(rows_csv), MINILM).fingerprint == before
    (described,) = empty_cache.glob("encoded/*/meta.json")
    described.write_text("{")
    assert encode(configure(rows_csv), MINILM).fingerprint == before
    assert tokenised == [30, 30, 30]


def test_of_many_at_once_only_one_tokenises(rows_csv: Path, tokenised: list[int]) -> None:
    with ThreadPoolExecutor(4) as pool:
        prints = set(pool.map(lambda _: encode(configure(rows_csv), MINILM).fingerprint, range(4)))
    assert tokenised == [30]
    assert len(prints) == 1


def test_an_unwritable_cache_is_a_clear_error(rows_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(rows_csv))  # a file, not a folder
    with pytest.raises(DataError, match=r"cannot write to the cache .*FEDPEFT_CACHE_DIR"):
        encode(configure(rows_csv), MINILM)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(
    rows_csv: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path, tokenised: list[int]
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(encoding, "save_file", full)
        with pytest.raises(DataError, match=r"No space left on device\. Make room"):
            encode(configure(rows_csv), MINILM)
    assert [path for path in empty_cache.glob("encoded/*") if path.is_dir()] == []
    encode(configure(rows_csv), MINILM)
    assert tokenised == [30, 30]


# a site's own rows, and other test rows


def test_a_site_may_see_one_label_only_and_lack_domains(tmp_path: Path, rows_csv: Path) -> None:
    own = write_csv(tmp_path / "own.csv", {"text": ["a", "b"], "label": ["no", "no"]})
    config = configure(rows_csv, data__domain="place")
    split = encode_rows(config, MINILM, own, ("yes", "no", "maybe"))
    assert split.labels is not None
    assert (split.labels.tolist(), split.domains, split.clients) == ([1, 1], None, None)
    named = configure(rows_csv, data__labels="maybe,no")
    assert encode_rows(named, MINILM, own).batch([0])["labels"].tolist() == [1]
    with pytest.raises(DataError, match=r"row 1 of .* has the label 'no'"):
        encode_rows(config, MINILM, own, ("yes", "maybe"))


def test_other_test_rows_are_encoded_with_the_labels_of_a_run(tmp_path: Path, rows_csv: Path) -> None:
    config = configure(rows_csv, data__domain="place")
    other = write_csv(tmp_path / "other.csv", {"text": ["a"], "label": ["no"], "place": ["west"]})
    split = encode_rows(config, MINILM, other, ("yes", "no"), test=True)
    assert (split.batch([0])["labels"].tolist(), split.domains) == ([1], ("west",))
    assert split.clients is None
    by = configure(rows_csv, partition__by="who")
    named = write_csv(tmp_path / "named.csv", {"text": ["a"], "label": ["no"], "who": [7]})
    assert encode_rows(by, MINILM, named, ("yes", "no"), test=True).clients == ("7",)
    assert encode_rows(by, MINILM, other, ("yes", "no"), test=True).clients is None
    bare = write_csv(tmp_path / "bare.csv", {"text": ["a"], "label": ["no"]})
    with pytest.raises(DataError, match="no column 'place'"):
        encode_rows(config, MINILM, bare, ("yes", "no"), test=True)


# folders that cannot encode


def test_a_model_without_tokenizer_or_processor_is_named(tmp_path: Path, rows_csv: Path, image_folder: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded") as caught:
        encode(configure(rows_csv), tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="has no image processor that can be loaded") as caught:
        encode(configure(image_folder, model__task="image-classification"), tmp_path)
    assert "\n" not in str(caught.value)
