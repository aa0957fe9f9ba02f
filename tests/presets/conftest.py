"""The presets that need no fetching, each built once for all tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.presets import PresetFiles, materialize

Hashes = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="session")
def digits_files() -> PresetFiles:
    return materialize("digits")


@pytest.fixture(scope="session")
def docstrings_files() -> PresetFiles:
    return materialize("docstrings")


@pytest.fixture
def hashes() -> Hashes:
    """Hash every file below a folder, by its path there."""

    def of(folder: Path) -> dict[str, str]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
        }

    return of
