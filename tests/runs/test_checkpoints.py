"""Checkpoints: as they were written, or found to be damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedpeft.errors import CheckpointError
from fedpeft.runs import Checkpoint, checkpoint_rounds, read_checkpoint, resumable_round
from fedpeft.runs.checkpoints import checkpoint_folder, remove_checkpoint, write_checkpoint

FILES = ("manifest.json", "state.json", "state.safetensors")


def write(run: Path, server_round: int) -> Path:
    tensors = {"z": torch.randn(3, 2), "a": torch.arange(5, dtype=torch.float64), "none": torch.zeros(0, 4)}
    write_checkpoint(run, Checkpoint(server_round, tensors, {"clip": 0.1 + 0.2, "names": ["é"]}))
    return checkpoint_folder(run, server_round)


def test_a_checkpoint_reads_as_it_was_written_in_its_own_order(tmp_path: Path) -> None:
    tensors = {"z": torch.randn(3, 2).T, "a": torch.arange(5, dtype=torch.float64), "scalar": torch.tensor(3)}
    tensors["the same"], tensors["a part"] = tensors["a"], tensors["z"][1]
    write_checkpoint(tmp_path, Checkpoint(7, tensors, {"clip": 0.1 + 0.2, "client": {"é": [1, None]}}))
    read = read_checkpoint(tmp_path, 7)
    assert list(read.tensors) == list(tensors)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.data_ptr() % 16 == 0 for tensor in read.tensors.values())  # as torch itself lays them
    assert read.facts == {"round": 7, "clip": 0.1 + 0.2, "client": {"é": [1, None]}}


@pytest.mark.parametrize("name", FILES)
def test_any_byte_that_is_flipped_is_found(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, 3) / name
    whole = file.read_bytes()
    for at in {*range(0, len(whole), 7), len(whole) - 1}:
        for bit in (0, 5):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match="the checkpoint of round 3 is damaged"):
                read_checkpoint(tmp_path, 3)
    file.write_bytes(whole)
    assert read_checkpoint(tmp_path, 3).round == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1]), lambda file: file.write_bytes(b"")]
)
def test_a_file_that_is_missing_or_cut_is_found_at_a_glance(
    name: str, harm: Callable[[Path], object], tmp_path: Path
) -> None:
    write(tmp_path, 3)
    harm(write(tmp_path, 12) / name)
    assert checkpoint_rounds(tmp_path) == [3, 12]
    assert resumable_round(tmp_path) == 3
    with pytest.raises(CheckpointError, match="the checkpoint of round 12"):
        read_checkpoint(tmp_path, 12)


def test_a_checkpoint_of_another_round_is_none_of_this(tmp_path: Path) -> None:
    write(tmp_path, 3).rename(checkpoint_folder(tmp_path, 4))
    with pytest.raises(CheckpointError, match="round 4 is damaged"):
        read_checkpoint(tmp_path, 4)


def test_rounds_are_numbers_and_what_was_half_written_is_none(tmp_path: Path) -> None:
    for server_round in (9_999, 10_000, 2):
        write(tmp_path, server_round)
    write(tmp_path, 5).rename(tmp_path / "checkpoints" / ".round-0005")
    assert checkpoint_rounds(tmp_path) == [2, 9_999, 10_000]
    write(tmp_path, 5)  # over what was left
    remove_checkpoint(tmp_path, 10_000)
    assert checkpoint_rounds(tmp_path) == [2, 5, 9_999]
    assert resumable_round(tmp_path / "nowhere") == 0
