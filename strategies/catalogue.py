"""What the methods are and which options they have, as plain data: the list that ``fedpeft strategies`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.config.template import keys_of
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
    return [
        {
            "name": option.name,
            "default": option.default,
            "required": option.required,
            "allowed": option.allowed,
            "description": option.description,
        }
        for option in keys_of(method.Options)
    ]
