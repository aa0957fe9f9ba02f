"""Who holds which rows, as ``fedpeft partition`` prints it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedpeft.formats import NONE, one_line
from fedpeft.report.layout import cell, new_table

SHOWN_CLIENTS = 40  # more than that is summarised; --json has them all
COUNTS_WIDTH = 60  # characters that columns of labels may take beside clients and rows


def partition_view(clients: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Lay out who holds what.

    Parameters
    ----------
    clients : sequence of mapping
        What `fedpeft.data.partition.partition_table` returns: ``client``, ``rows``, and ``labels`` and ``domains``
        (name to number of rows) where there are any.
    """
    kinds = [kind for kind in ("labels", "domains") if any(client.get(kind) for client in clients)]
    parts: list[RenderableType] = []
    for kind in kinds or ["rows"]:
        parts += [_holdings(clients, kind), Text()]
    if len(clients) > SHOWN_CLIENTS:
        parts.append(Text(f"{len(clients) - SHOWN_CLIENTS // 2} clients are not shown; --json has them all.", "dim"))
    return Group(*parts, Text(rows_summary([client["rows"] for client in clients])))


def _holdings(clients: Sequence[Mapping[str, Any]], kind: str) -> Table:
    """Lay out rows by label or domain: a column each where they fit, else the most frequent in words."""
    counted: list[Mapping[str, int]] = [(client.get(kind) or {}) if kind != "rows" else {} for client in clients]
    names = list(dict.fromkeys(name for counts in counted for name in counts))
    digits = max((len(str(count)) for counts in counted for count in counts.values()), default=1)
    fits = sum(max(cell_len(one_line(name)), digits) + 2 for name in names) <= COUNTS_WIDTH
    columns = names if fits else []
    table = new_table("client", "rows", *columns, right=("rows", *columns), whole=("rows", *columns))
    if not fits:
        table.add_column(f"rows of each of {len(names)} {kind}", overflow="fold")
    shown = len(clients) if len(clients) <= SHOWN_CLIENTS else SHOWN_CLIENTS // 2
    for client, counts in list(zip(clients, counted, strict=True))[:shown]:
        cells = [_count(counts.get(name, 0)) for name in columns] if fits else [_most(counts, kind)]
        table.add_row(cell(client["client"], "bold cyan"), str(client["rows"]), *cells)
    return table


def _count(rows: int) -> Text:
    return Text(str(rows)) if rows else Text(".", "dim")


def _most(counts: Mapping[str, int], kind: str, limit: int = 6) -> Text:
    most = sorted(((count, name) for name, count in counts.items() if count), key=lambda pair: (-pair[0], pair[1]))
    words = [f"{one_line(name, 24)}: {count}" for count, name in most[:limit]]
    if len(most) > limit:
        words.append(f"and {len(most) - limit} more {kind}")
    return Text(", ".join(words) or NONE)


def rows_summary(rows: Sequence[int]) -> str:
    """Say in one line how rows are spread over clients."""
    if not rows:
        return "no clients"
    if len(rows) == 1:
        return f"1 client, {rows[0]} rows"
    each = f"{min(rows)} to {max(rows)} each, median {statistics.median(rows):g}"
    return f"{len(rows)} clients, {sum(rows)} rows: {each}"
