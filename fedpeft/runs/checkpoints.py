"""Checkpoints: all that a run needs to go on after a round, whole or not there at all, and checked by sum.

A checkpoint is a folder ``checkpoints/round-NNNN`` of a table of tensors, plain JSON, and a manifest of both with their
SHA-256. It is written under a hidden name, brought to the disk, and then renamed: whoever is killed meanwhile leaves
nothing that looks like one. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.cache import sync
from fedpeft.errors import CheckpointError
from fedpeft.jsons import to_json

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS = "checkpoints"
TENSORS_FILE, STATE_FILE, MANIFEST_FILE = "state.safetensors", "state.json", "manifest.json"
PREFIX = "round-"
EVENTS = "events"  # key of the state: bytes of metrics.jsonl that were written when the round was over


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Parameters
    ----------
    round : int
        That round.
    tensors : dict of str to Tensor
        In the order in which they were given.
    facts : dict
        Whatever else there is, as plain JSON.
    """

    round: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def checkpoint_folder(run: Path, server_round: int) -> Path:
    """Return where the checkpoint of a round lies in a run directory."""
    return run / CHECKPOINTS / f"{PREFIX}{server_round:04d}"


def checkpoint_rounds(run: Path) -> list[int]:
    """Return the rounds of which a run directory holds a checkpoint, whole or damaged, ascending."""
    names = [path.name.removeprefix(PREFIX) for path in (run / CHECKPOINTS).glob(f"{PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which no two share memory, as a file needs them: the best adapter may be the last one."""
    apart: dict[str, Tensor] = {}
    places = set[int]()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous() if place not in places else tensor.clone().contiguous()
        places.add(place)
    return apart


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, and return when it is on the disk.

    Raises
    ------
    OSError, SafetensorError
        It cannot be written; what was there before is as it was.
    """
    from safetensors.torch import save_file

    final = checkpoint_folder(run, checkpoint.round)
    partial = final.with_name(f".{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_apart(checkpoint.tensors), partial / TENSORS_FILE)
        # the file orders its tensors by itself, and sums over them may not
        facts = {"round": checkpoint.round, **checkpoint.facts, "tensors": list(checkpoint.tensors)}
        (partial / STATE_FILE).write_text(to_json(facts) + "\n", encoding="utf-8")
        sums = {name: _sum(partial / name) for name in (STATE_FILE, TENSORS_FILE)}
        (partial / MANIFEST_FILE).write_text(_manifest(checkpoint.round, sums), encoding="utf-8")
        for name in (TENSORS_FILE, STATE_FILE, MANIFEST_FILE, ""):
            sync(partial / name)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, of a run that has come here a second time
        partial.replace(final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_facts(run: Path, server_round: int) -> dict[str, Any]:
    """Read what the checkpoint of a round holds besides tensors, once both files are found to be as written.

    Raises
    ------
    CheckpointError
        A file is missing, or is not what was written.
    """
    folder = checkpoint_folder(run, server_round)
    sums = _read_manifest(folder, server_round)
    try:
        for name, known in sums.items():
            if _sum(folder / name) != known:
                raise CheckpointError(f"the checkpoint of round {server_round} is damaged: {name} has another checksum")
        facts = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the checkpoint of round {server_round} is damaged: {Path(error.filename).name} is missing"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the checkpoint of round {server_round} is damaged: {error}") from None
    if not isinstance(facts, dict):
        raise CheckpointError(f"the checkpoint of round {server_round} is damaged: {STATE_FILE} is no JSON object")
    return facts


def read_checkpoint(run: Path, server_round: int) -> Checkpoint:
    """Read the checkpoint of a round; see `read_facts`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = read_facts(run, server_round)
    try:
        # copies: in the file they lie at any address, and kernels may round by that
        found = {
            name: tensor.clone()
            for name, tensor in load_file(checkpoint_folder(run, server_round) / TENSORS_FILE).items()
        }
        tensors = {name: found[name] for name in facts.pop("tensors")}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint of round {server_round} is damaged: {error}") from None
    return Checkpoint(server_round, tensors, facts)


def remove_checkpoint(run: Path, server_round: int) -> None:
    """Remove the checkpoint of a round, by a name that is none first: half of one never looks whole."""
    folder = checkpoint_folder(run, server_round)
    gone = folder.with_name(f".{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    try:
        folder.rename(gone)
    except OSError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def resumable_round(run: Path) -> int:
    """Return the round after which a run can go on, 0 for its beginning; by a glance, which takes sums on trust."""
    for server_round in reversed(checkpoint_rounds(run)):
        folder = checkpoint_folder(run, server_round)
        try:
            sums = _read_manifest(folder, server_round)
            if all((folder / name).stat().st_size == known["bytes"] for name, known in sums.items()):
                return server_round
        except (CheckpointError, OSError):
            continue
    return 0


def _sum(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _manifest(server_round: int, sums: Mapping[str, Any]) -> str:
    return to_json({"round": server_round, "files": sums}, indent=2, sort_keys=True) + "\n"


def _read_manifest(folder: Path, server_round: int) -> dict[str, dict[str, Any]]:
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        sums = json.loads(text)["files"]
        # written in one way only, so that no byte of the manifest itself may change unseen
        if text == _manifest(server_round, sums) and sums.keys() == {STATE_FILE, TENSORS_FILE}:
            return dict(sums)
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint of round {server_round} has no {MANIFEST_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"the checkpoint of round {server_round} is damaged: {MANIFEST_FILE} is not as written")
