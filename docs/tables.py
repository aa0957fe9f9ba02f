"""Write the tables that follow from what is registered; what each kind trains is written by hand, and kept.

python docs/tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from fedpeft.adapters.kinds import KINDS
from fedpeft.config import AdapterConfig
from fedpeft.errors import ConfigError
from fedpeft.strategies import available

ADAPTERS = Path(__file__).with_name("adapters.md")
MARKS = re.compile(r"(<!-- adapter kinds -->\n\n).*?(\n\n<!-- end of adapter kinds -->)", re.DOTALL)
HEADER = "| `adapter.kind` | trains | averaging is exact | begins as | merged by |\n|---|---|---|---|---|"


def trained(text: str) -> dict[str, str]:
    """Return the hand-written column by kind."""
    rows = [row.split("|") for row in text.splitlines() if row.startswith("| `")]
    return {name: row[2].strip() for row in rows for name in re.findall(r"`([^`]+)`", row[1])}


def takes(method: type, kind: str) -> bool:
    """Tell whether a method takes a kind, with the options that it has by default."""
    try:
        method.check(method.Options(), AdapterConfig.model_construct(kind=kind))
    except ConfigError:
        return False
    return kind in method.capabilities.kinds


def merged_by(kind: str) -> str:
    """Name the methods that take a kind, or those few that do not."""
    methods = available()
    able = [name for name, method in methods.items() if takes(method, kind)]
    others = [name for name in methods if name not in able]
    if len(others) < len(able) / 3:
        return "all methods" + (" but " + ", ".join(f"`{name}`" for name in others) if others else "")
    return ", ".join(f"`{name}`" for name in able)


def kinds_table(text: str) -> str:
    """Return the table of adapter kinds, with the words that the page has for each."""
    words = trained(text)
    rows = (
        f"| `{kind.name}` | {words.get(kind.name, 'what PEFT trains')} | {'yes' if kind.linear else 'no'} "
        f"| {', '.join(f'`{init}`' for init in kind.inits)} | {merged_by(kind.name)} |"
        for kind in KINDS.ours.values()
    )
    return "\n".join((HEADER, *rows))


def with_tables(text: str) -> str:
    """Return the page with its table as it must be."""
    return MARKS.sub(lambda found: found[1] + kinds_table(text) + found[2], text)


if __name__ == "__main__":
    ADAPTERS.write_text(with_tables(ADAPTERS.read_text(encoding="utf-8")), encoding="utf-8")
