"""The examples run, from an empty folder, on what fedpeft brings with it.

In this process, and notebooks cell by cell in one namespace: an interpreter for each, or a kernel, would spend most of
its time on imports.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from fedpeft.adapters.kinds import KINDS
from fedpeft.strategies import STRATEGIES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# what each prints at least
SCRIPTS = {
    "first_run": "round 4: accuracy 0.",
    "own_csv": "3 sites, accuracy ",
    "tiny_llama": "next: cd capitals && fedpeft simulate run.toml",
    "own_strategy": "one-vote: accuracy 0.",
    "own_adapter_kind": "and averaging it is exact: True",
    "private_run": "guarantee: False\nOver all rounds, each row is protected with epsilon = 2.99",
}
LEFT = {"tiny_llama": "capitals"}  # what it leaves that makes no run
NOTEBOOKS = {"compare_methods": "lora-fair", "load_the_adapter": "of 200 rows right"}


def cells(name: str) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    book = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SCRIPTS.keys()
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_it_is_about(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # so that the examples' own method and kind leave with them
    monkeypatch.setitem(STRATEGIES, "one-vote", STRATEGIES["fedit"])
    monkeypatch.setitem(KINDS.ours, "ffa-rslora", KINDS.ours["lora"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SCRIPTS[name] in capsys.readouterr().out
    assert any((tmp_path / LEFT.get(name, "runs")).iterdir())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebooks_cells_run_in_their_order(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(name):
        exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), namespace)
    assert NOTEBOOKS[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_with_the_outputs_of_one_run_from_top_to_bottom(name: str) -> None:
    kept = cells(name)
    assert [cell["execution_count"] for cell in kept] == list(range(1, len(kept) + 1))
    text = json.dumps([cell["outputs"] for cell in kept])
    assert NOTEBOOKS[name] in text
    assert len(text) < 4000  # pictures and logs are for a run directory
    assert {output["output_type"] for cell in kept for output in cell["outputs"]} <= {"stream", "execute_result"}
