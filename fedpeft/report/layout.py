"""How every table of the terminal is laid out. Foreign text becomes `rich.text.Text`, never markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from fedpeft.formats import NONE, number, one_line


def new_table(*headers: str, right: Iterable[str] = (), whole: Iterable[str] = (), header: bool = True) -> Table:
    """Make an empty table; columns in `whole` are never broken over lines."""
    table = Table(
        box=box.SIMPLE_HEAD if header else None,
        show_header=header,
        show_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for name in headers:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(Text(one_line(name)), justify=justify, overflow="fold", no_wrap=name in whole)
    return table


def cell(value: object, style: str = "") -> Text:
    """Return a value as literal text; a dash for what is missing."""
    return Text(NONE if value is None or value == "" else one_line(value, 2000), style)


def pairs(facts: Iterable[tuple[str, object]]) -> Table:
    """Lay out names and values, a row each."""
    table = new_table("", "", header=False)
    table.columns[0].no_wrap = True
    for name, value in facts:
        table.add_row(Text(f"{name} ", "bold"), cell(value))
    return table


def markdown_table(lines: Iterable[Iterable[str]]) -> str:
    """Write cells as a table of Markdown, the line of dashes among them."""
    return "\n".join("| " + " | ".join(one_line(each).replace("|", "\\|") for each in line) + " |" for line in lines)


def with_spread(facts: Mapping[str, Any]) -> str:
    """Return a mean score, and its spread over seeds where there are several."""
    return number(facts["score"]) + ("" if facts["spread"] is None else f" ± {facts['spread']:.4f}")


def as_typed(value: object) -> str:
    """Return a setting's value as one would type it."""
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
