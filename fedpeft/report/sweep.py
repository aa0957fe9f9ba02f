"""Utility against epsilon: a table for the terminal and in Markdown, and a plot whose axis holds infinity.

A column is a budget that was asked for. The epsilon in its cells is what the runs themselves state that they spent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.formats import NONE, finite, number, one_line
from fedpeft.report.comparison import BOUNDS
from fedpeft.report.layout import cell, new_table
from fedpeft.report.plots import LIGHT, Theme, draw_line, place_legend, render_figure, scale_axis, short_label
from fedpeft.report.privacy import accountants, epsilon
from fedpeft.rounding import as_given
from fedpeft.runs import read_config

Facts = dict[str, Any]
UNLIMITED = "no privacy"
LABEL_WIDTH = 26
GAP = (math.nan, math.nan)  # where a line is broken


def sweep(
    points: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    rounds: int,
    runs: Sequence[Mapping[str, Any]],
    statements: Sequence[Mapping[str, Any]],
) -> Facts:
    """Summarise runs by adapter, strategy and budget.

    Parameters
    ----------
    points : sequence of mapping
        What was asked for, in the order in which it is shown: ``label`` of its runs, ``adapter`` (None where it is left
        to the method), ``strategy`` and ``budget``, an epsilon, or None for no privacy.
    seeds : sequence of int
        What each was to be run with.
    rounds : int
        Of each run.
    runs : sequence of mapping
        The complete ones; see `fedpeft.simulations.compare.run_facts`.
    statements : sequence of mapping
        What the private ones among them state; see `fedpeft.privacy.statement.state`.

    Returns
    -------
    dict
        ``lines``, each of one adapter and strategy with its ``points``, and the ``runs`` that they were made of.
    """
    lines: dict[tuple[str | None, str], list[Facts]] = {}
    labels: dict[tuple[str | None, str], list[str]] = {}
    for point in points:
        own = [run for run in runs if run["label"] == point["label"]]
        scores = [run["score"] for run in own if run["score"] is not None]
        claims = [run["epsilon"] for run in own]
        labels.setdefault((point["adapter"], point["strategy"]), []).append(point["label"])
        lines.setdefault((point["adapter"], point["strategy"]), []).append(
            {
                "budget": point["budget"],
                "runs": len(own),
                "score": statistics.fmean(scores) if scores else None,
                "spread": statistics.stdev(scores) if len(scores) > 1 else None,
                # one run that states none leaves nothing to be said of all
                "epsilon_max": max(claims) if claims and None not in claims else None,
            }
        )
    budgets = dict.fromkeys(point["budget"] for point in points)
    facts: Facts = {
        "metric": runs[0]["metric"] if runs else "score",
        "rounds": rounds,
        "seeds": list(seeds),
        "budgets": sorted(budgets, key=_position_of_budget),
        "lines": [
            {
                "adapter": adapter or _kind_used(runs, labels[adapter, strategy]),
                "strategy": strategy,
                "points": sorted(own, key=lambda one: _position_of_budget(one["budget"])),
            }
            for (adapter, strategy), own in lines.items()
        ],
        "runs": [dict(run) for run in runs],
    }
    return facts | {"notes": _notes(facts, statements)}


def _kind_used(runs: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str | None:
    """Return what kind of adapter the runs of a line had, where it was left to configuration and method."""
    kinds = dict.fromkeys(
        read_config(Path(run["path"])).adapter.kind for run in runs if run["label"] in labels and "path" in run
    )
    return ", ".join(kinds) or None


def _position_of_budget(budget: float | None) -> float:
    return math.inf if budget is None else budget


def _notes(facts: Facts, statements: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = facts["seeds"]
    over = f"means over seeds {seeds[0]} to {seeds[-1]}; ± is the sample standard deviation"
    notes = [
        f"After {facts['rounds']} rounds, {over if len(seeds) > 1 else f'seed {seeds[0]}'}. A column is a budget; "
        "epsilon is what the runs state in their privacy.json, the largest over seeds."
    ]
    if statements:
        notes.append(_assumptions(statements))
    if None in facts["budgets"]:
        notes.append(f"{UNLIMITED}: privacy.level = none, epsilon is infinite.")
    notes.append(
        "Each epsilon is of one run alone: adapters of several runs on the same rows, or a setting chosen by their "
        "scores, cost more."
    )
    strategies = {line["strategy"].partition(":")[0] for line in facts["lines"]}
    return notes + [note for name, note in BOUNDS.items() if name in strategies]


def _assumptions(statements: Sequence[Mapping[str, Any]]) -> str:
    """Say on one line what all the epsilons rest on."""
    one = statements[0]
    computed = sorted({name for each in statements for name in each.get("computed_by", ())})
    by = accountants({**one, "computed_by": computed})
    reasons = dict.fromkeys(reason for each in statements for reason in each["reasons"])
    warnings = dict.fromkeys(warning for each in statements for warning in each["warnings"])
    return " ".join(
        [
            f"Privacy of level {one['level']} at delta = {one['delta']:g} ({by}); neighbours: {one['adjacency']}.",
            *([f"No guarantee: {'; '.join(reasons)}."] if reasons else []),
            *(f"Warning: {warning}." for warning in warnings),
        ]
    )


# --- the table ---------------------------------------------------------------------------------------------------


def sweep_table(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `sweep` returns."""
    heads = [_head(budget) for budget in facts["budgets"]]
    table = new_table(facts["metric"], *heads, right=heads, whole=heads)
    for line in facts["lines"]:
        name, _, options = line["strategy"].partition(":")
        shown = cell(name, "bold cyan")
        for more in (one_line(options), line["adapter"]):
            if more:
                shown.append(f"\n{more}", "dim")
        table.add_row(shown, *(_cell(point, len(facts["seeds"])) for point in _by_budget(line, facts["budgets"])))
    notes = [Text(one_line(note, 2000), "dim") for note in facts["notes"]]
    return Group(table, Text(), *notes)


def sweep_markdown(facts: Mapping[str, Any]) -> str:
    """Write the same table as Markdown."""
    lines = [["adapter", "strategy", *map(_head, facts["budgets"])]]
    lines.append(["---", "---", *["---:"] * len(facts["budgets"])])
    for line in facts["lines"]:
        points = _by_budget(line, facts["budgets"])
        cells = [", ".join(_words(point, len(facts["seeds"]))) for point in points]
        lines.append([line["adapter"] or NONE, line["strategy"], *cells])
    table = "\n".join("| " + " | ".join(one_line(each).replace("|", "\\|") for each in line) + " |" for line in lines)
    return "\n\n".join([f"Test {facts['metric']}:", table, *facts["notes"]]) + "\n"


def _head(budget: float | None) -> str:
    return UNLIMITED if budget is None else f"budget {as_given(budget)}"


def _by_budget(line: Mapping[str, Any], budgets: Sequence[float | None]) -> list[Facts | None]:
    held = {point["budget"]: point for point in line["points"]}
    return [held.get(budget) for budget in budgets]


def _cell(point: Facts | None, wanted: int) -> Text:
    score, *more = _words(point, wanted)
    return Text.assemble(score, *((f"\n{words}", "dim") for words in more))


def _words(point: Facts | None, wanted: int) -> list[str]:
    """Return a score, the epsilon that goes with it, and how many runs they are of if not of all."""
    if point is None or not point["runs"]:
        return [NONE]
    words = [number(point["score"]) + ("" if point["spread"] is None else f" ± {point['spread']:.4f}")]
    if point["budget"] is not None:
        words.append(f"epsilon {epsilon(point['epsilon_max'])}")
    return words + ([f"{point['runs']} of {wanted} runs"] if point["runs"] < wanted else [])


# --- the plot ----------------------------------------------------------------------------------------------------


def sweep_plot(facts: Mapping[str, Any], theme: Theme = LIGHT) -> bytes | None:
    """Draw score against epsilon as PNG, with error bars over seeds; None where no run is complete.

    Points stand at the epsilon that their runs state. The axis is logarithmic, and infinity stands at its end.
    """
    return render_figure(f"Test {facts['metric']} against epsilon", lambda axes: _curves(axes, facts, theme), theme)


def _curves(axes: Axes, facts: Mapping[str, Any], theme: Theme) -> bool:
    budgets = [math.log10(budget) for budget in facts["budgets"] if budget is not None]
    reach = max(budgets, default=0.0) - min(budgets, default=0.0)
    infinity = max(budgets, default=0.0) + max(0.3, reach / 4)
    lines, every = [], []
    for index, line in enumerate(facts["lines"]):
        placed = [(_place(point, infinity), point["score"], point["spread"]) for point in line["points"]]
        known = [(at, score, spread or 0.0) for at, score, spread in placed if at is not None and score is not None]
        if not known:
            continue
        placed_at = [(at, score) for at, score, _ in known]
        # infinity is no place on the axis: no line leads there
        points = [pair for pair in placed_at if pair[0] != infinity]
        points += [GAP] * bool(points) + [pair for pair in placed_at if pair[0] == infinity]
        name = ", ".join(filter(None, (line["strategy"], line["adapter"])))
        drawn = draw_line(axes, points, short_label(name, limit=LABEL_WIDTH), theme, index, width=1.8)
        axes.errorbar(
            [at for at, _, _ in known],
            [score for _, score, _ in known],
            yerr=[spread for _, _, spread in known],
            fmt="none",
            ecolor=drawn.get_color(),
            elinewidth=1.2,
            capsize=3,
            zorder=2,
        )
        lines.append(drawn)
        every += [(at, score + sign * spread) for at, score, spread in known for sign in (1, -1)]
    axes.set_ylabel(facts["metric"])
    axes.set_xlabel("epsilon that the runs state, logarithmic")
    ticks = {math.log10(budget): as_given(budget) for budget in facts["budgets"] if budget is not None}
    if None in facts["budgets"]:
        ticks[infinity] = "∞"
        if budgets:
            axes.axvline((max(budgets) + infinity) / 2, color=theme.ink, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(list(ticks.values()))
    scale_axis(axes, every, bounded=facts["metric"] != "perplexity")
    if len(lines) > 1:
        place_legend(axes, lines)
    return bool(lines)


def _place(point: Facts, infinity: float) -> float | None:
    """Return where a point stands; None where an epsilon was asked for and none can be stated."""
    if point["budget"] is None:
        return infinity
    claimed = finite(point["epsilon_max"])
    return math.log10(claimed) if claimed else None
