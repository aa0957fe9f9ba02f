from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedpeft.report.tables import environment_table, presets_table, scores_table, strategies_dict, strategies_table
from tests.report.printing import joined, printed

# --- strategies


def test_every_method_is_listed_with_its_facts_and_options() -> None:
    from fedpeft.strategies import available

    methods = strategies_dict()
    assert json.loads(json.dumps(methods)) == methods
    assert [method["name"] for method in methods] == list(available())
    text = printed(strategies_table())
    for name, method in available().items():
        for expected in (name, *method.Options.model_fields):
            assert expected in text
        assert joined(method.capabilities.exact) in joined(text)


def test_options_show_what_is_allowed_and_the_default() -> None:
    from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
    from fedpeft.strategies.capabilities import Capabilities

    class MethodOptions(StrategyOptions):
        solver: Literal["fast", "exact"] = Field("fast", description="how")
        tau: float | None = Field(None, gt=0, le=1, description="share kept")
        folds: int = Field(description="how many", ge=2)
        strict: bool = True

    class Method(AdapterStrategy):
        name: ClassVar[str] = "method"
        capabilities: ClassVar[Capabilities] = Capabilities("arXiv 1", "A", "never", True)
        Options = MethodOptions

    (described,) = strategies_dict({"method": Method})
    assert described["needs_single_factors"] is True
    options = {option.pop("name"): option for option in described["options"]}
    assert options["solver"] == {"default": "fast", "required": False, "allowed": "fast | exact", "description": "how"}
    assert options["tau"]["allowed"] == "number > 0, <= 1 or unset"
    assert options["folds"] == {
        "default": None,
        "required": True,
        "allowed": "whole number >= 2",
        "description": "how many",
    }
    text = joined(printed(strategies_table(strategies_dict({"method": Method}))))
    assert "fast | exact, default fast. how" in text
    assert "whole number >= 2, required. how many" in text
    assert "true or false, default true" in text


# --- presets, environment, scores


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
