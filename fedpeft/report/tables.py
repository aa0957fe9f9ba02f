"""Methods, presets, environment and scores as tables that read well at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from fedpeft.formats import NONE, number, one_line
from fedpeft.jsons import to_json
from fedpeft.report.layout import as_typed, cell, new_table, pairs
from fedpeft.tasks.metrics import shown


def strategies_table(methods: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Lay out what `fedpeft.strategies.catalogue` returns: methods side by side, then what is particular to each."""
    columns = ("strategy", "paper", "trains", "exact?", "mixed ranks?", "personal?", "sums only?")
    table = new_table(*columns, whole=("strategy",))
    details: list[RenderableType] = []
    for method in methods:
        name = cell(method["name"], "bold cyan")
        personal = ("all" if len(method["personal"]) > 1 else method["personal"][0]) if method["personal"] else "no"
        table.add_row(
            name,
            cell(method["paper"].removeprefix("arXiv ")),
            cell(method["trains"]),
            _exact_in_short(method["exact"]),
            _yes(method["mixed_ranks"]),
            personal,
            _yes(not method["needs_single_factors"]),
        )
        facts: list[tuple[str, object]] = [("sends", method["sends"]), ("exact", method["exact"])]
        if method["personal"]:
            facts.append(("personal", f"{', '.join(method['personal'])} stays with each client"))
        if method["head"] != "shared":
            facts.append(("head", f"{method['head']}, unless adapter.head says otherwise"))
        facts.append(("kinds", ", ".join(method["kinds"])))
        for option in method["options"]:
            default = "required" if option["required"] else f"default {as_typed(option['default'])}"
            facts.append((option["name"], f"{option['allowed']}, {default}. {option['description']}"))
        details += [Text(), name, Padding(pairs(facts), (0, 0, 0, 2))]
    return Group(
        table,
        Text(
            "exact: what is sent is the mean of the clients' products. sums only: the server need not see one client."
        ),
        *details,
        Text(),
        Text("Choose one with --strategy NAME, an option with strategy.OPTION=VALUE.", "dim"),
    )


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _exact_in_short(words: str) -> str:
    """Put a method's claim in a word or two; the whole follows below the table."""
    if words.startswith("does not apply"):
        return "-"
    if words.startswith("for one client"):
        return "no"
    return "yes" if words.startswith("always") else "in cases"


def presets_table(presets: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Lay out presets.

    Parameters
    ----------
    presets : sequence of mapping
        Each with ``name``, ``task``, ``description`` and ``needs``, a command or None.
    """
    table = new_table("preset", "task", "description", whole=("preset", "task"))
    for preset in presets:
        described = cell(preset.get("description"))
        if needs := preset.get("needs"):
            described.append(f"\nneeds: {one_line(needs)}", "yellow")
        table.add_row(cell(preset.get("name"), "bold cyan"), cell(preset.get("task")), described)
    return Group(table, Text(), Text("Run one with fedpeft simulate --preset NAME.", "dim"))


def environment_table(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `fedpeft.runs.environment` returns."""
    return pairs(environment_rows(facts))


def environment_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flatten an environment into names and words; packages last, each a row of its own."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name == "packages":
            continue
        if isinstance(value, list | tuple):
            shown = ", ".join(map(str, value)) or "none"
        elif isinstance(value, Mapping):
            shown = to_json(value, ensure_ascii=False)
        else:
            shown = NONE if value is None else str(value)
        rows.append((str(name).replace("_", " "), shown))
    packages = facts.get("packages")
    if isinstance(packages, Mapping):
        rows += [(str(package), str(version)) for package, version in packages.items()]
    return rows


def scores_table(scores: Mapping[str, Any]) -> RenderableType:
    """Lay out scores.

    Parameters
    ----------
    scores : mapping
        Metrics by name, and ``domains``, ``run`` and ``examples`` where known.
    """
    metrics = shown(scores)
    table = new_table("", *metrics, right=metrics)
    table.add_row(cell("all test rows", "bold"), *(cell(number(scores[name]), "bold green") for name in metrics))
    domains = scores.get("domains")
    if isinstance(domains, Mapping):
        for domain, values in domains.items():
            table.add_row(cell(domain), *(cell(number(values.get(name))) for name in metrics))
    facts = [(name, scores[name]) for name in ("run", "examples") if name in scores]
    return Group(pairs(facts), Text(), table) if facts else table


def merged_table(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `fedpeft.strategies.merging.merge.Merged.to_dict` returns."""
    table = new_table("adapter", "rank", "scaling", "weight", right=("rank", "scaling", "weight"))
    for each in facts["inputs"]:
        ranks, scalings = (", ".join(f"{value:.4g}" for value in each[name]) for name in ("ranks", "scalings"))
        table.add_row(cell(each["path"], "bold"), cell(ranks), cell(scalings), cell(f"{each['weight']:.4g}"))
    options = ", ".join(f"{name}={as_typed(value)}" for name, value in facts["options"].items())
    error = "exact up to rounding" if facts["exact"] else "of the weighted mean of updates"
    rows = [
        ("method", f"{facts['method']}{f' ({options})' if options else ''}"),
        ("merged rank", ", ".join(map(str, facts["ranks"]))),
        ("relative error", f"{number(facts['error'])}, {error}"),
        ("result", facts["note"] or None),
        ("type", facts["dtype"]),
        ("base", facts["base"]),
        ("written", facts["out"]),
    ]
    return Group(table, Text(), pairs(row for row in rows if row[1]))
