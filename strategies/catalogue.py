"""What the methods are and which options they have, as plain data: the list that ``fedpeft strategies`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.strategies.base import AdapterStrategy

Facts = dict[str, Any]


def catalogue(methods: Mapping[str, type[AdapterStrategy]]) -> list[Facts]:
    """Describe methods: name, paper, what they send, when they are exact, and their options.

    Parameters
    ----------
    methods : mapping of str to type
        By name, such as `fedpeft.strategies.available` returns them.
    """
    return [
        {
            "name": name,
            "paper": method.capabilities.paper,
            "sends": method.capabilities.sends,
            "exact": method.capabilities.exact,
            "needs_single_factors": method.capabilities.needs_single_factors,
            "trains": method.capabilities.trains,
            "personal": sorted(method.capabilities.personal),
            "head": method.capabilities.head,
            "mixed_ranks": method.capabilities.mixed_ranks,
            "changes_base": method.capabilities.changes_base,
            "kinds": sorted(method.capabilities.kinds),
            "options": _options(method),
        }
        for name, method in methods.items()
    ]


def _options(method: type[AdapterStrategy]) -> list[Facts]:
    schema = method.Options.model_json_schema()
    required = schema.get("required", ())
    return [
        {
            "name": name,
            "default": facts.get("default"),
            "required": name in required,
            "allowed": _allowed(facts, schema.get("$defs", {})),
            "description": facts.get("description", ""),
        }
        for name, facts in schema.get("properties", {}).items()
    ]


def _allowed(facts: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Say in a few characters what a JSON schema allows."""
    if "$ref" in facts:
        return _allowed(known.get(str(facts["$ref"]).rpartition("/")[2], {}), known)
    if "anyOf" in facts:
        return " or ".join(_allowed(each, known) for each in facts["anyOf"])
    if "enum" in facts:
        return " | ".join(str(value) for value in facts["enum"])
    if "const" in facts:
        return str(facts["const"])
    limits = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {facts[limit]:g}" for limit, sign in limits if limit in facts]
    kinds = {"null": "unset", "integer": "whole number", "string": "text", "boolean": "true or false", "array": "list"}
    kind = str(facts.get("type", "any"))
    return " ".join([kinds.get(kind, kind), ", ".join(bounds)]).strip()
