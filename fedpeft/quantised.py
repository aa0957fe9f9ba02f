"""Quantised bases: which method holds one, and its quantised weights as a file that processes share.

Quantising takes a pass over all weights, and would leave each process a copy of its own. So it is done once, into the
cache, and every process reads the same bytes from there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from fedpeft.cache import cache_dir
from fedpeft.config import RunConfig
from fedpeft.errors import ModelError
from fedpeft.mapped import QUANTISED, WEIGHTS, is_whole, key_of, publish, weight_files
from fedpeft.quantization import QUANTIZATIONS, Quantization, saved_as

VERSION = 1


def method_of(config: RunConfig, saved: Any, folder: Path, device: str) -> Quantization | None:
    """Return how a run holds its base in fewer bits; None where it does not.

    Parameters
    ----------
    config : RunConfig
        May ask for a method.
    saved : object
        Transformers' configuration of the base, which may say that it is saved so.
    folder : Path
        The base's.
    device : str
        Type of the device that the model is to be on.

    Raises
    ------
    ModelError
        The base is saved in a way that is not known here, or in one and asked for in another; a package is missing; or
        the method does not compute on this device.
    """
    asked, held = config.model.quantization, getattr(saved, "quantization_config", None)
    if held is None:
        if asked is None:
            return None
        method = QUANTIZATIONS.find(asked)
        method.check(device, f"model.quantization = '{asked}'")
        return method
    held = held if isinstance(held, dict) else held.to_dict()
    found = saved_as(held)
    if asked is not None:
        what = f"'{found.name}'" if found is not None else f"quant_method = '{held.get('quant_method')}'"
        raise ModelError(
            f"model.quantization = '{asked}': '{folder}' is saved quantised already, as {what}. Leave "
            "model.quantization unset, or give the base that it was made of."
        )
    if found is None:
        known = ", ".join(sorted({each.saved for each in QUANTIZATIONS.all().values()}))
        raise ModelError(
            f"'{folder}' is saved quantised with quant_method = '{held.get('quant_method')}', on which no adapter is "
            f"trained here. Known: {known}; or give the base that it was made of, with model.quantization."
        )
    found.check(device, f"'{folder}', which is saved quantised ({found.name}),")
    return found


def quantised_folder(
    folder: Path, method: Quantization, facts: Collection[object], make: Callable[[], tuple[Any, Collection[str]]]
) -> Path | None:
    """Return a folder of the quantised weights; None where they cannot be kept.

    Parameters
    ----------
    folder : Path
        Of the base as it is saved.
    method : Quantization
        How its weights are held.
    facts : collection
        What else they depend on.
    make : callable
        Loads the quantised model, and returns it with the names of the tensors that the base's files do not hold. Asked
        only where nothing is in the cache.

    Raises
    ------
    DataError
        The cache cannot be written.
    """
    files = weight_files(folder)
    if not files:
        return None
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", method.library)]
    named = json.dumps([VERSION, method.name, [str(fact) for fact in facts], versions])
    kept = cache_dir() / "bases" / QUANTISED / key_of(files) / hashlib.sha256(named.encode()).hexdigest()[:32]

    def write(draft: Path) -> None:
        model, drawn = make()
        model.save_pretrained(draft, max_shard_size="1000000GB")
        _leave_out(draft / WEIGHTS, drawn)

    if not is_whole(kept):
        publish(kept, write)
    return kept


def _leave_out(path: Path, names: Collection[str]) -> None:
    """Take tensors out of a file: a head that was drawn is drawn by each run from its own seed."""
    with safe_open(path, "pt") as file:
        held, metadata = list(file.keys()), file.metadata() or {}
        if not set(held) & set(names):
            return
        tensors = {name: file.get_tensor(name).clone() for name in held if name not in names}
    metadata = {name: text for name, text in metadata.items() if name not in names}
    if listed := metadata.get("tensor_names"):  # torchao's
        metadata["tensor_names"] = json.dumps([name for name in json.loads(listed) if name not in names])
    save_file(tensors, path, metadata)
