"""One copy of the weights for all processes of a machine: in the right precision, whole, and the very same values."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedpeft import mapped
from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.cache import cache_dir
from fedpeft.config import RunConfig
from fedpeft.models import BaseModel, load_base

Make = Callable[..., RunConfig]
LABELS = ("no", "yes")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def half(tiny_bert: Path, tmp_path: Path) -> Path:
    """The tiny BERT in half the precision."""
    folder = tmp_path / "half"
    shutil.copytree(tiny_bert, folder)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tiny_bert / mapped.WEIGHTS).items()}
    save_file(tensors, folder / mapped.WEIGHTS, {"format": "pt"})
    return folder


def load(make: Make, folder: Path, precision: str = "fp32") -> BaseModel:
    return load_base(make(model__name=str(folder), train__precision=precision), folder, LABELS)


def conversions() -> list[Path]:
    return sorted(path for path in (cache_dir() / "bases").glob("*") if path.is_dir())


def homes(model: nn.Module) -> dict[str, str]:
    """Return the file that each parameter lies in; empty for memory of its own."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    areas = [(*(int(end, 16) for end in line[0].split("-")), line[5] if len(line) > 5 else "") for line in lines]
    return {
        name: next(file for start, end, file in areas if start <= tensor.data_ptr() < end)
        for name, tensor in model.named_parameters()
    }


def test_weights_of_another_precision_are_converted_once_and_have_the_values_that_loading_would_give(
    tiny_bert: Path, text_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fedpeft.models.mapped_folder", lambda folder, *_: folder)
        plain = load(text_config, tiny_bert, "bf16")
    assert conversions() == []
    first = load(text_config, tiny_bert, "bf16")
    (kept,) = conversions()
    monkeypatch.setattr(mapped, "_convert", lambda *_: pytest.fail("converted twice"))
    second = load(text_config, tiny_bert, "bf16")
    assert conversions() == [kept]
    for model in (first.model, second.model):
        found, expected = model.state_dict(), plain.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)  # the drawn head's too
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert first.folder == tiny_bert
    assert first.model.name_or_path == str(tiny_bert)


def test_weights_that_are_in_the_wanted_precision_are_not_written_again(
    tiny_bert: Path, half: Path, text_config: Make
) -> None:
    load(text_config, tiny_bert)
    load(text_config, half, "bf16")
    assert conversions() == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of the pages")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_frozen_weights_of_an_adapted_model_stay_in_the_file_and_nothing_writes_to_them(
    tiny_bert: Path, half: Path, text_config: Make, precision: str
) -> None:
    folder = half if precision == "fp32" else tiny_bert
    config = text_config(model__name=str(folder), train__precision=precision)
    adapted = AdaptedModel(load_base(config, folder, LABELS), config)
    adapted.load(adapted.initial, adapted.scaling)
    rows = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        adapted.model(**rows).logits.sum().backward()
    (kept,) = conversions()
    file = str(kept / mapped.WEIGHTS)
    lying = homes(adapted.model)
    own = {name for name, where in lying.items() if where != file}
    # the adapter, and what the checkpoint does not hold
    assert all(
        "lora_" in name or "modules_to_save" in name or ".classifier." in name or ".pooler." in name for name in own
    )
    assert len(lying.keys() - own) > 30
    entries = re.findall(rf"{re.escape(file)}\n((?:\w+: .*\n)+)", Path("/proc/self/smaps").read_text())
    assert entries
    assert sum(int(kb) for entry in entries for kb in re.findall(r"Anonymous: +(\d+)", entry)) == 0


def test_a_damaged_conversion_is_found_and_made_again(tiny_bert: Path, text_config: Make) -> None:
    whole = load(text_config, tiny_bert, "bf16").model.state_dict()
    (kept,) = conversions()
    file = kept / mapped.WEIGHTS
    good = file.read_bytes()
    for bad in (good[:-100], b"\xff" * 8 + good[8:], b""):
        file.unlink()  # the pages of the model above stay as they are
        file.write_bytes(bad)
        found = load(text_config, tiny_bert, "bf16").model.state_dict()
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert file.read_bytes() == good
    (kept / mapped.SIZES).unlink()
    load(text_config, tiny_bert, "bf16")
    assert json.loads((kept / mapped.SIZES).read_text())[mapped.WEIGHTS] == len(good)


def test_a_conversion_of_the_right_size_with_other_bytes_is_found_as_a_run_begins(
    tiny_bert: Path, text_config: Make
) -> None:
    whole = load(text_config, tiny_bert, "bf16").model.state_dict()
    (kept,) = conversions()
    mapped.verify(tiny_bert)
    assert conversions() == [kept]
    good = (kept / mapped.WEIGHTS).read_bytes()
    (kept / mapped.WEIGHTS).unlink()  # the pages of the model above stay as they are
    (kept / mapped.WEIGHTS).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    mapped.verify(tiny_bert)
    assert conversions() == []
    found = load(text_config, tiny_bert, "bf16").model.state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_other_weights_under_the_same_name_are_converted_anew(half: Path, text_config: Make) -> None:
    before = load(text_config, half).model.state_dict()
    tensors = {name: tensor + 1 for name, tensor in load_file(half / mapped.WEIGHTS).items()}
    (half / mapped.WEIGHTS).unlink()
    save_file(tensors, half / mapped.WEIGHTS, {"format": "pt"})
    after = load(text_config, half).model.state_dict()
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(after[name], (before[name].bfloat16() + 1).float())
    assert len(conversions()) == 2


def test_weights_in_several_files_are_converted_file_by_file(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "parts"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    kept = mapped.mapped_folder(folder, torch.bfloat16, lambda: model.bfloat16())
    assert sorted(path.name for path in kept.glob("*.safetensors")) == sorted(
        path.name for path in folder.glob("*.safetensors")
    )
    again = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


class Mixed(nn.Module):
    """A model that keeps its norms in full precision, by the list that transformers reads or by how it makes them."""

    def __init__(self, *, listed: bool) -> None:
        super().__init__()
        self._keep_in_fp32_modules_strict = {"norm"} if listed else set()
        self.linear = nn.Linear(2, 2, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(2, dtype=torch.bfloat16 if listed else torch.float32)


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_that_keeps_some_weights_in_another_precision_is_loaded_from_its_own_files(
    tiny_bert: Path, *, listed: bool
) -> None:
    assert mapped.mapped_folder(tiny_bert, torch.bfloat16, lambda: Mixed(listed=listed)) == tiny_bert
    assert conversions() == []


def test_a_full_disk_costs_memory_and_not_the_run(
    tiny_bert: Path,
    text_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path / "file"))
    load(text_config, tiny_bert, "bf16")
    assert "every process holds a copy of the base's weights: cannot write to the cache" in caplog.text


def _convert(folder: str, start: Callable[[], None], made: Callable[[str], None]) -> None:
    convert = mapped._convert

    def noted(*args: Path) -> None:
        made(str(os.getpid()))
        convert(*args)

    mapped._convert = noted
    start()
    mapped.mapped_folder(Path(folder), torch.bfloat16, lambda: nn.Linear(2, 2, dtype=torch.bfloat16))


def test_of_two_processes_that_come_at_once_one_converts(tiny_bert: Path) -> None:
    forks = multiprocessing.get_context("fork")
    barrier, made = forks.Barrier(2), forks.SimpleQueue()
    both = [forks.Process(target=_convert, args=(str(tiny_bert), barrier.wait, made.put)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    made.get()
    assert made.empty()
    assert len(conversions()) == 1
