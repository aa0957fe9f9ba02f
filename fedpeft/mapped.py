"""A base's weights in the precision they are used in, as files that all processes of a machine map and share.

`from_pretrained` maps weights from their file and copies none, as long as the file holds them in the wanted precision:
then the pages belong to the machine, however many processes use them. Else each process would convert a copy of its
own. So the conversion is made once, into the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedpeft.cache import cache_dir, locked, publishing

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # what transformers reads, the first if both
BESIDES = ("config.json", "generation_config.json", INDEX)
QUANTISED = "quantised"  # folder of what `fedpeft.quantised` keeps
SIZES, SUMS = "sizes.json", "sha256.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
CALLED = {torch.float32: "F32", torch.bfloat16: "BF16"}


def mapped_folder(folder: Path, dtype: torch.dtype, build: Callable[[], Any]) -> Path:
    """Return a folder of the same weights in this precision: `folder` itself where it holds them so.

    Parameters
    ----------
    folder : Path
        Of a transformers model.
    dtype : torch.dtype
        float32 or bfloat16.
    build : callable
        Makes the model without its weights (on torch's device ``meta``) as it would be loaded in this precision. Asked
        only where nothing is in the cache.

    Returns
    -------
    Path
        `folder` too where its weights cannot be kept converted: they are quantised, or the model keeps some of them in
        another precision. Then each process converts what it needs, as it loads.

    Raises
    ------
    DataError
        The cache cannot be written.
    """
    files = weight_files(folder)
    if not files:
        return folder
    headers = [_dtypes(path) for path in files]
    held = {kind for header in headers for kind in header.values()}
    if held & FLOATS <= {CALLED[dtype]} or not held <= FLOATS | {"I64", "I32", "BOOL"}:
        return folder
    kept = cache_dir() / "bases" / key_of(files, dtype)
    if not is_whole(kept):
        if not _is_uniform(build(), dtype):
            return folder
        publish(kept, partial(_convert, folder, files, dtype))
    return kept


def publish(kept: Path, write: Callable[[Path], None]) -> None:
    """Make a folder of weights in the cache, unless another process is faster, and write down what it holds.

    Parameters
    ----------
    kept : Path
        The folder.
    write : callable
        Writes the files into the empty folder that it is given.

    Raises
    ------
    DataError
        The cache cannot be written.
    """
    with locked(kept):
        if is_whole(kept):
            return
        with publishing(kept) as draft:
            write(draft)
            sizes = {path.name: path.stat().st_size for path in draft.iterdir()}
            (draft / SUMS).write_text(json.dumps({name: file_sum(draft / name) for name in sizes}), encoding="utf-8")
            (draft / SIZES).write_text(json.dumps(sizes), encoding="utf-8")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers would read; none where they have other names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    files = [folder / name for name in names]
    return files if all(path.parent == folder and path.is_file() for path in files) else []


def _dtypes(path: Path) -> Mapping[str, str]:
    """Return the type of each tensor of a file, as safetensors calls it; empty for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {"": "damaged"}  # which the loading says better


def key_of(files: list[Path], dtype: torch.dtype | None = None) -> str:
    """Return what names a conversion: the files, as they were when it was made, and its precision if it has one."""
    stats = [(str(path.resolve()), path.stat()) for path in files]
    facts = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in stats]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, str(dtype), facts]).encode()).hexdigest()[:32]


def is_whole(kept: Path) -> bool:
    """Tell whether a conversion is there and undamaged, by the sizes and the headers of its files."""
    try:
        sizes = json.loads((kept / SIZES).read_text(encoding="utf-8"))
        if {path.name: path.stat().st_size for path in kept.iterdir() if path.name not in (SIZES, SUMS)} != sizes:
            return False
    except (OSError, ValueError):
        return False
    return all("" not in _dtypes(path) for path in kept.glob("*.safetensors"))


def _is_uniform(model: Any, dtype: torch.dtype) -> bool:
    """Tell whether a model holds all its saved numbers in one precision, and asks for no other as it loads them."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) if dtype == torch.bfloat16 else None
    kinds = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    return not strict and kinds == {dtype}


def _convert(folder: Path, files: list[Path], dtype: torch.dtype, draft: Path) -> None:
    for path in files:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, tensor in tensors.items():
                tensors[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
            save_file(tensors, draft / path.name, file.metadata())
    for name in BESIDES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, draft / name)


def file_sum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> None:
    """Remove the conversions of a base whose bytes are not those that were written; the next loading makes them anew.

    Each file is read whole, which takes 0.1 s for 100 MB; so a run's driver asks once, and no worker does.

    Parameters
    ----------
    folder : Path
        Of a transformers model.

    Raises
    ------
    DataError
        One is damaged, and the cache cannot be written.
    """
    files = weight_files(folder)
    if not files:
        return
    every = [cache_dir() / "bases" / key_of(files, dtype) for dtype in CALLED]
    every += (cache_dir() / "bases" / QUANTISED / key_of(files)).glob("[0-9a-f]" * 32)
    for kept in every:
        if not is_whole(kept) or _is_sound(kept):
            continue
        log.warning("the converted weights in '%s' are damaged, and are made again", kept)
        with locked(kept):
            shutil.rmtree(kept, ignore_errors=True)


def _is_sound(kept: Path) -> bool:
    try:
        sums = json.loads((kept / SUMS).read_text(encoding="utf-8"))
        return all(file_sum(kept / name) == held for name, held in sums.items())
    except (OSError, ValueError, AttributeError):
        return False
