"""Whether adapters on disk are adapters of one model, and mean the same by what is no factor."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.adapters.export import SavedAdapter
from fedpeft.adapters.lora_fields import LORA_FIELDS, Meaning, canonical, written_fields
from fedpeft.adapters.state import AdapterState, fingerprint
from fedpeft.errors import AdapterError

BASE = "base_model_name_or_path"
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_alike(adapters: Sequence[SavedAdapter], base: str | None = None) -> dict[str, Any]:
    """Return the configuration of what these adapters merge into, its ranks aside.

    Parameters
    ----------
    adapters : sequence of SavedAdapter
        At least one.
    base : str, optional
        The base of all of them, whatever it is called in each.

    Raises
    ------
    AdapterError
        They differ in what must be the same; lists in what, and which folder has what.
    """
    first = adapters[0]
    differences, common = [], written_fields(first.config)
    for name, meaning in LORA_FIELDS.items():
        if meaning not in (Meaning.SAME, Meaning.AGREE) or (name == BASE and base is not None):
            continue
        values = {str(adapter.path): canonical(name, adapter.config.get(name)) for adapter in adapters}
        if name == BASE:
            values = {path: _resolved(value) for path, value in values.items()}
        given = {path: value for path, value in values.items() if meaning is Meaning.SAME or value is not None}
        if len({str(value) for value in given.values()}) > 1:
            listed = ", ".join(f"'{path}' has {_shown(value)}" for path, value in given.items())
            differences.append(f"{name}: {listed}{' (name it by --base FOLDER if it is one)' if name == BASE else ''}")
        elif meaning is Meaning.AGREE and given:
            common[name] = next(a.config[name] for a in adapters if canonical(name, a.config.get(name)) is not None)
    differences += _differing_labels(adapters)
    for other in adapters[1:]:
        differences += _differing_layers(first, other)
    if differences:
        raise AdapterError(
            f"these adapters are no adapters of one model: {'; '.join(differences)}. Merge those that agree."
        )
    return common if base is None else common | {BASE: base}


def check_base(adapters: Sequence[SavedAdapter], base: str) -> str:
    """Compare the base that is said to be that of all adapters with theirs, by the digest of their weights.

    Returns
    -------
    str
        In words, which were the same, and which could not be compared.

    Raises
    ------
    AdapterError
        No such folder, or a base of other weights.
    """
    named = list(dict.fromkeys(str(a.config[BASE]) for a in adapters if canonical(BASE, a.config.get(BASE))))
    folder = Path(base).expanduser()
    if not base.strip() or (not folder.is_dir() and base not in named and HUB_ID.fullmatch(base) is None):
        raise AdapterError(f"--base '{base}' is no folder here, no hub id, and no adapter's base; check its path.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise AdapterError(f"--base '{base}' is not a transformers folder: it holds no config.json.")
    others = [name for name in named if name != base]
    here = [name for name in others if _weights(Path(name))]
    if not _weights(folder):
        here = []
    given = weights_digest(folder) if here else ""
    for name in here:
        if Path(name).resolve() != folder.resolve() and weights_digest(Path(name)) != given:
            raise AdapterError(f"--base '{base}' and '{name}' hold different weights: they are not one model.")
    unknown = [name for name in others if name not in here]
    same = f"the same weights as {', '.join(here)}" if here else ""
    taken = f"taken for {', '.join(unknown)} without comparing weights" if unknown else ""
    return "; ".join(part for part in (same, taken) if part)


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of a folder's tensors by their names, however they are divided into files."""
    from safetensors import SafetensorError, safe_open

    digests: dict[str, str] = {}
    for file in _weights(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                digests |= {name: fingerprint({name: tensors.get_tensor(name)}) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"cannot read '{file}': {error}") from None
    return hashlib.sha256("".join(f"{name}{digests[name]}" for name in sorted(digests)).encode()).hexdigest()


def _resolved(value: Any) -> Any:
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_dir() else value


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _differing_labels(adapters: Sequence[SavedAdapter]) -> Iterable[str]:
    labelled = {str(adapter.path): adapter.labels for adapter in adapters if adapter.labels is not None}
    (path, names), *rest = labelled.items() if labelled else [("", None)]
    for other, labels in rest:
        if labels != names:
            yield f"labels.json: '{path}' has {_few(names)}, '{other}' has {_few(labels)}"
            return


def _few(labels: Sequence[str] | None) -> str:
    listed = list(labels or ())
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _differing_layers(one: SavedAdapter, other: SavedAdapter) -> Iterable[str]:
    ours, theirs = _shapes(one.state), _shapes(other.state)
    for adapter, mine, yours in ((one, ours, theirs), (other, theirs, ours)):
        if odd := sorted(mine.keys() - yours.keys()):
            rest = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            yield f"'{adapter.path}' alone of '{one.path}' and '{other.path}' has {odd[0]}{rest}"
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            yield f"{name}: '{one.path}' has {ours[name]}, '{other.path}' has {theirs[name]}"
            return


def _shapes(state: AdapterState) -> Mapping[str, tuple[int, ...]]:
    """Return (d_out, d_in) of each layer, and the shape of every other tensor."""
    layers = {layer: (f.B.shape[0], f.A.shape[1]) for layer, f in state.factors.items()}
    return {**layers, **{name: tuple(tensor.shape) for name, tensor in state.dense.items()}}
