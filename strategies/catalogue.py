"""What the methods are and which options they have, as plain data: the list that ``fedpeft strategies`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.config.template import keys_of
from fedpeft.strategies.base import AdapterStrategy

Facts = dict[str, Any]
CAPABILITIES = (
    *("paper", "sends", "exact", "needs_single_factors", "trains", "personal", "head", "mixed_ranks"),
    *("changes_base", "kinds"),
)
OF_OPTIONS = ("name", "default", "required", "allowed", "description")


def catalogue(methods: Mapping[str, type[AdapterStrategy]]) -> list[Facts]:
    """Describe methods: name, paper, what they send, when they are exact, and their options.

    Parameters
    ----------
    methods : mapping of str to type
        By name, such as `fedpeft.strategies.available` returns them.
    """
    described = []
    for name, method in methods.items():
        facts = {key: getattr(method.capabilities, key) for key in CAPABILITIES}
        facts |= {key: sorted(value) for key, value in facts.items() if isinstance(value, frozenset)}
        options = [{key: getattr(option, key) for key in OF_OPTIONS} for option in keys_of(method.Options)]
        described.append({"name": name, **facts, "options": options})
    return described
