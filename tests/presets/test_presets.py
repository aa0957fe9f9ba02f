from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft import presets, tasks
from fedpeft.config import nest, resolve
from fedpeft.errors import ConfigError
from fedpeft.presets import PRESETS, Preset, PresetFiles, fetch, layer, materialize, provenance


class Stub:
    """A builder that writes one word into each folder."""

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.built = 0
        self.inside = threading.Event()
        self.failing = False

    def ingredients(self) -> Mapping[str, str]:
        return {"version": self.version}

    def build(self, folder: Path) -> dict[str, Any]:
        self.built += 1
        self.inside.set()
        for part in ("model", "data"):
            (folder / part).mkdir()
            (folder / part / "word").write_text(self.version)
        if self.failing:
            raise ConfigError("no luck")
        return {"built": self.built}

    def report(self, files: PresetFiles) -> str:
        return f"made {files.model}"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stub:
    """Put one stub in the place of every builder, and an empty cache in the place of the tests' own."""
    stub = Stub()
    monkeypatch.setattr(Preset, "builder", property(lambda self: stub))
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path))
    return stub


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "{'torch', 'transformers', 'datasets', 'sklearn', 'scipy', 'ray', 'flwr', 'peft'} & sys.modules.keys()"


def test_importing_the_presets_imports_nothing_heavy() -> None:
    assert run_python(f"import sys, fedpeft.presets; print({HEAVY} or 'light')") == "light"


def test_a_built_preset_is_found_by_another_process_without_importing_torch(digits_files: PresetFiles) -> None:
    code = f"""
import sys
from fedpeft.presets import materialize
print(materialize("digits").model)
assert not {HEAVY}
"""
    assert run_python(code) == str(digits_files.model)


@pytest.mark.parametrize("name", PRESETS)
def test_every_layer_is_a_valid_configuration_that_names_its_own_preset(name: str) -> None:
    config = resolve([layer(name)])
    assert config.model.name == config.data.source == f"preset:{name}"
    assert tasks.of(config).name == config.model.task == PRESETS[name].task


@pytest.mark.parametrize("name", PRESETS)
def test_every_builder_says_what_its_files_depend_on(name: str) -> None:
    ingredients = dict(PRESETS[name].builder.ingredients())
    assert {"builder", "seed"} <= ingredients.keys()
    assert json.loads(json.dumps(ingredients)) == ingredients


@pytest.mark.parametrize("use", [materialize, layer, fetch])
def test_an_unknown_preset_is_an_error_that_names_the_nearest(use: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown preset 'digit'\. Did you mean 'digits'\? Allowed: chat, d"
    ) as error:
        use("digit")
    assert "\n" not in str(error.value)


def test_a_second_call_builds_nothing(stub: Stub) -> None:
    first, second = materialize("digits"), materialize("digits")
    assert stub.built == 1
    assert first == second
    assert first.provenance == {"preset": "digits", "built": 1, "ingredients": {"version": "1"}}
    assert (first.model / "word").read_text() == (first.data / "word").read_text() == "1"


def test_files_of_other_ingredients_are_other_files(stub: Stub) -> None:
    first = materialize("digits")
    stub.version = "2"
    second = materialize("digits")
    assert stub.built == 2
    assert first.model != second.model
    assert [(files.model / "word").read_text() for files in (first, second)] == ["1", "2"]


def test_a_failed_build_leaves_nothing_that_passes_for_the_preset(stub: Stub, tmp_path: Path) -> None:
    stub.failing = True
    with pytest.raises(ConfigError, match="no luck"):
        materialize("digits")
    assert not list(tmp_path.rglob("word"))
    stub.failing = False
    assert (materialize("digits").model / "word").is_file()


def test_callers_at_the_same_time_build_once(stub: Stub) -> None:
    found: list[PresetFiles] = []
    threads = [threading.Thread(target=lambda: found.append(materialize("digits"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stub.built == 1
    assert len(found) == 4
    assert all(files == found[0] for files in found)


def test_provenance_speaks_of_presets_alone(stub: Stub) -> None:
    both = resolve([nest({"model.name": "preset:digits", "data.source": "preset:digits"})])
    assert provenance(both.presets) == {"digits": {"preset": "digits", "built": 1, "ingredients": {"version": "1"}}}
    assert provenance(resolve([nest({"model.name": "some/folder", "data.source": "rows.csv"})]).presets) == {}


def test_a_preset_that_is_not_fetched_says_which_command_fetches_it(stub: Stub) -> None:
    with pytest.raises(ConfigError, match="run `fedpeft presets fetch chat`") as error:
        materialize("chat")
    assert "\n" not in str(error.value)
    assert stub.built == 0


def test_a_fetched_preset_is_there_for_good(stub: Stub) -> None:
    assert fetch("chat") == f"made {materialize('chat').model}"
    fetch("chat")
    assert stub.built == 1


def test_what_needs_no_fetching_is_not_fetched(stub: Stub) -> None:
    with pytest.raises(ConfigError, match=r"'digits' is not fetched: it is made when first used\. Only 'chat' is"):
        fetch("digits")
    with pytest.raises(ConfigError, match=r"'docstrings' is not fetched: it needs `pip install 'fedpeft\[text\]'`"):
        fetch("docstrings")
    assert stub.built == 0


def test_names_of_presets_are_those_of_their_modules_and_files() -> None:
    folder = Path(presets.__file__).parent
    assert {path.stem for path in folder.glob("*.toml")} == set(PRESETS)
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(PRESETS)
    assert all(name == preset.name and "\n" not in preset.description for name, preset in PRESETS.items())
