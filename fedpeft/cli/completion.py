"""What a shell may complete, looked up without the libraries that a run needs: it must answer between two keys."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

METHOD_NAME = re.compile(r'^    name(?:: .*)? = "([a-z0-9-]+)"$', re.MULTILINE)


def complete_strategy(incomplete: str) -> list[str]:
    """Complete the name of a strategy."""
    return _beginning(incomplete, strategy_names())


def strategy_names() -> list[str]:
    """Return the names of all strategies: read in the sources, since importing them loads torch and Flower."""
    from importlib.metadata import entry_points

    package = importlib.util.find_spec("fedpeft.strategies")
    assert package is not None
    folders = [Path(folder) for folder in package.submodule_search_locations or ()]
    sources = (path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.py"))
    names = [name for source in sources for name in METHOD_NAME.findall(source)]
    return [*names, *entry_points(group="fedpeft.strategies").names]


def complete_preset(incomplete: str) -> list[str]:
    """Complete the name of a preset."""
    from fedpeft.presets import PRESETS

    return _beginning(incomplete, PRESETS)


def complete_word(incomplete: str) -> list[str]:
    """Complete a word of a configuration: a TOML file, ``section.key=``, or the value of one that names a choice."""
    name, equals, value = incomplete.partition("=")
    if equals:
        return [f"{name}={choice}" for choice in _beginning(value, _choices(name))]
    from fedpeft.config.template import keys

    folder, _, _ = incomplete.rpartition("/")
    files = [str(path) for path in Path(folder or ".").glob("*.toml")]
    return _beginning(incomplete, [*files, *(f"{key}=" for key in keys())])


def _choices(name: str) -> Iterable[str]:
    if name == "strategy.name":
        return complete_strategy("")
    from fedpeft.config.template import keys

    key = keys().get(name)
    return () if key is None else key.choices


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})
