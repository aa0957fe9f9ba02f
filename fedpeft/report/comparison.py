"""Methods side by side: mean and spread over seeds, as a table of the terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.formats import NONE, duration, number, one_line, size
from fedpeft.report.layout import cell, new_table
from fedpeft.report.privacy import epsilon
from fedpeft.runs.history import ERRORS

Facts = dict[str, Any]
OWN_ROWS, OF_TOTAL = "own rows", "of total"
MEANS = ("own_rows", "worst_domain", *ERRORS, "bytes", "seconds")  # of what a comparison shows of each run
BOUNDS = {
    "centralized": "centralized, the upper bound, is no federation: one client holds all rows, and makes as many steps "
    "a round as the clients of a round together (or as many epochs as each).",
    "local": "local, the lower bound: every client trains alone and sends nothing; its score is the mean over the "
    "clients' own models.",
}


def comparison(labels: Sequence[str], seeds: Sequence[int], rounds: int, runs: Sequence[Mapping[str, Any]]) -> Facts:
    """Summarise runs by method.

    Parameters
    ----------
    labels : sequence of str
        The methods, in the order in which they are shown.
    seeds : sequence of int
        What each was to be run with.
    rounds : int
        Of each run.
    runs : sequence of mapping
        The complete ones; see `fedpeft.simulations.compare.run_facts`.

    Returns
    -------
    dict
        ``rows`` with mean and spread of each method, and the ``runs`` that they were made of.
    """
    rows = []
    for label in labels:
        own = [run for run in runs if run["label"] == label]
        scores = [run["score"] for run in own if run["score"] is not None]
        rows.append(
            {
                "method": label,
                "runs": len(own),
                "score": _mean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else None,
                **{key: _mean([run[key] for run in own if run.get(key) is not None]) for key in MEANS},
                # of which one states none, the group has none
                "epsilon": max((run["epsilon"] or 0.0 for run in own), default=None)
                if all(run["epsilon"] is not None for run in own)
                else None,
            }
        )
    metric = runs[0]["metric"] if runs else "score"
    facts = {"metric": metric, "rounds": rounds, "seeds": list(seeds), "rows": rows, "runs": [dict(r) for r in runs]}
    return facts | {"notes": _notes(facts)}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _notes(facts: Facts) -> list[str]:
    many = len(facts["seeds"])
    over = f"means over seeds {facts['seeds'][0]} to {facts['seeds'][-1]}" if many > 1 else f"seed {facts['seeds'][0]}"
    spread = "; ± is the sample standard deviation" if many > 1 else ""
    notes = [
        f"After {facts['rounds']} rounds, {over}{spread}. Aggregation error is the last round's, |DW - sent|, relative "
        "to what the round was to change, |DW - s B_t A_t|; of total, in comparison.md, to all that has been learned. "
        "Moved is up and down in all rounds, and time that of all rounds, of one run."
    ]
    if any(row["own_rows"] is not None for row in facts["rows"]):
        notes.append(
            f"{OWN_ROWS.capitalize()}: the mean over clients of each one's score on its own share of the test rows, by "
            f"its own model where it has one; {facts['metric']} is on all test rows."
        )
    if any(row["epsilon"] is not None for row in facts["rows"]):
        notes.append(
            "Epsilon, the largest over seeds, is what each run states in its privacy.json, beside what it rests on."
        )
    methods = {row["method"].partition(":")[0] for row in facts["rows"]}
    return notes + [note for name, note in BOUNDS.items() if name in methods]


def _columns(facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the cells by column; columns that no method has anything for are left out."""
    rows = facts["rows"]
    wanted = len(facts["seeds"])
    columns = {
        "method": [
            row["method"] if row["runs"] == wanted else f"{row['method']} ({row['runs']} of {wanted} runs)"
            for row in rows
        ],
        facts["metric"]: [_with_spread(row) for row in rows],
        "epsilon": [epsilon(row["epsilon"]) for row in rows],
        OWN_ROWS: [number(row["own_rows"]) for row in rows],
        "worst domain": [number(row["worst_domain"]) for row in rows],
        "aggregation error": [number(row["aggregation_error"]) for row in rows],
        OF_TOTAL: [number(row.get("aggregation_error_of_total")) for row in rows],
        "moved": [size(row["bytes"]) for row in rows],
        "time": [duration(row["seconds"]) for row in rows],
    }
    return {name: cells for name, cells in columns.items() if name == "method" or set(cells) != {NONE}}


def _with_spread(row: Mapping[str, Any]) -> str:
    return number(row["score"]) + ("" if row["spread"] is None else f" ± {row['spread']:.4f}")


def comparison_table(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `comparison` returns, for 80 columns: the error of total stands in the files alone."""
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
    table = "\n".join("| " + " | ".join(one_line(each).replace("|", "\\|") for each in line) + " |" for line in lines)
    return "\n\n".join([table, *facts["notes"]]) + "\n"


def _across(columns: Mapping[str, Sequence[str]]) -> Iterable[list[str]]:
    return [list(line) for line in zip(*columns.values(), strict=True)]
