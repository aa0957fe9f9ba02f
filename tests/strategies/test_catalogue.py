from __future__ import annotations

import json
import re
from typing import ClassVar, Literal

from pydantic import Field

from fedpeft.adapters.kinds import KINDS
from fedpeft.report.tables import strategies_table
from fedpeft.strategies import available
from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import Capabilities
from fedpeft.strategies.catalogue import catalogue
from tests.report.printing import joined, printed


def test_every_method_is_listed_with_its_facts_and_options() -> None:
    methods = catalogue(available())
    assert json.loads(json.dumps(methods)) == methods
    assert [method["name"] for method in methods] == list(available())
    text = printed(strategies_table(methods))
    for name, method in available().items():
        for expected in (name, *method.Options.model_fields):
            assert expected in text
        assert joined(method.capabilities.exact) in joined(text)


def test_options_show_what_is_allowed_and_the_default() -> None:
    class MethodOptions(StrategyOptions):
        solver: Literal["fast", "exact"] = Field("fast", description="how")
        tau: float | None = Field(None, gt=0, le=1, description="share kept")
        folds: int = Field(description="how many", ge=2)
        strict: bool = True

    class Method(AdapterStrategy):
        name: ClassVar[str] = "method"
        capabilities: ClassVar[Capabilities] = Capabilities("arXiv 1", "A", "never", True)
        Options = MethodOptions

    (described,) = catalogue({"method": Method})
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
    text = joined(printed(strategies_table(catalogue({"method": Method}))))
    assert "fast | exact, default fast. how" in text
    assert "whole number >= 2, required. how many" in text
    assert "true or false, default true" in text


def test_fedit_says_that_it_is_exact_for_the_linear_kinds_and_for_no_other() -> None:
    said = re.findall(r"[\w-]+", available()["fedit"].capabilities.exact)
    assert {name for name in KINDS.ours if name in said} == {name for name, kind in KINDS.ours.items() if kind.linear}
