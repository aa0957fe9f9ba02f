"""Methods side by side: mean and spread over seeds, as a table of the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.formats import NONE, duration, number, one_line, size
from fedpeft.report.layout import cell, markdown_table, new_table, with_spread
from fedpeft.report.privacy import epsilon

OF_TOTAL = "of total"


def _columns(facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the cells by column; columns that no method has anything for are left out."""
    rows = facts["rows"]
    wanted = len(facts["seeds"])
    columns = {
        "method": [
            row["method"] if row["runs"] == wanted else f"{row['method']} ({row['runs']} of {wanted} runs)"
            for row in rows
        ],
        facts["metric"]: [with_spread(row) for row in rows],
        "epsilon": [epsilon(row["epsilon"]) for row in rows],
        "own rows": [number(row["own_rows"]) for row in rows],
        "worst domain": [number(row["worst_domain"]) for row in rows],
        "aggregation error": [number(row["aggregation_error"]) for row in rows],
        OF_TOTAL: [number(row.get("aggregation_error_of_total")) for row in rows],
        "moved": [size(row["bytes"]) for row in rows],
        "time": [duration(row["seconds"]) for row in rows],
    }
    return {name: cells for name, cells in columns.items() if name == "method" or set(cells) != {NONE}}


def comparison_table(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `fedpeft.simulations.judging.comparison` returns, for 80 columns.

    The error of total stands in the files alone.
    """
    columns = {name: cells for name, cells in _columns(facts).items() if name != OF_TOTAL}
    others = list(columns)[1:]
    table = new_table(*columns, right=others, whole=others[:1])
    for column, name in zip(table.columns, columns, strict=True):
        column.header = Text(one_line(name).replace(" ", "\n"))
    for label, *cells in _across(columns):
        name, _, options = label.partition(":")
        shown = cell(name, "bold cyan")
        if options:
            shown.append(f"\n{one_line(options)}", "dim")
        table.add_row(shown, *(cell(value) for value in cells))
    notes = [Text(one_line(note, 1000), "dim") for note in facts["notes"]]
    return Group(table, Text(), *notes)


def comparison_markdown(facts: Mapping[str, Any]) -> str:
    """Write the same table as Markdown."""
    columns = _columns(facts)
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *_across(columns)]
    return "\n\n".join([markdown_table(lines), *facts["notes"]]) + "\n"


def _across(columns: Mapping[str, Sequence[str]]) -> Iterable[list[str]]:
    return [list(line) for line in zip(*columns.values(), strict=True)]
