from __future__ import annotations

from typing import Any

from fedpeft.report.tables import environment_table, presets_table, scores_table
from tests.report.printing import printed


def test_presets_are_listed_with_what_they_need() -> None:
    presets: list[dict[str, Any]] = [
        {"name": "digits", "task": "image-classification", "description": "handwritten digits " * 5, "needs": None},
        {"name": "pairs", "task": "causal-lm", "description": "chat", "needs": "pip install 'fedpeft[text]'"},
    ]
    text = printed(presets_table(presets))
    for expected in ("digits", "image-classification", "causal-lm", "needs: pip install 'fedpeft[text]'"):
        assert expected in text
    assert text.count("needs") == 1


def test_the_environment_shows_versions_and_hardware() -> None:
    text = printed(environment_table({"python": "3.11.7", "cores": 2, "gpus": [], "packages": {"torch": "2.13.0"}}))
    assert [line.split() for line in text.splitlines()] == [
        ["python", "3.11.7"],
        ["cores", "2"],
        ["gpus", "none"],
        ["torch", "2.13.0"],
    ]


def test_scores_are_listed_by_domain_with_names_taken_literally() -> None:
    scores = {"run": "runs/first", "examples": 40, "loss": 0.5, "accuracy": 0.75, "macro_f1": 0.7}
    text = printed(scores_table({**scores, "domains": {"[bold]a": {"loss": 0.25, "accuracy": 0.875, "macro_f1": 0.8}}}))
    rows = [line.split() for line in text.splitlines()]
    assert ["accuracy", "macro_f1", "loss"] in rows
    assert ["all", "test", "rows", "0.7500", "0.7000", "0.5000"] in rows
    assert ["[bold]a", "0.8750", "0.8000", "0.2500"] in rows
