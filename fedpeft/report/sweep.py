"""Utility against epsilon: a table for the terminal and in Markdown, and a plot whose axis holds infinity.

A column is a budget that was asked for. The epsilon in its cells is what the runs themselves state that they spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.formats import NONE, finite, one_line
from fedpeft.report.layout import cell, markdown_table, new_table, with_spread
from fedpeft.report.plots import LIGHT, Theme, bounded, draw_line, place_legend, render_figure, scale_axis, short_label
from fedpeft.report.privacy import epsilon
from fedpeft.rounding import as_given

Facts = dict[str, Any]
UNLIMITED = "no privacy"
LABEL_WIDTH = 26
GAP = (math.nan, math.nan)  # where a line is broken


# --- the table ---------------------------------------------------------------------------------------------------


def sweep_table(facts: Mapping[str, Any]) -> RenderableType:
    """Lay out what `fedpeft.simulations.judging.sweep` returns."""
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
    return "\n\n".join([f"Test {facts['metric']}:", markdown_table(lines), *facts["notes"]]) + "\n"


def _head(budget: float | None) -> str:
    return UNLIMITED if budget is None else f"budget {as_given(budget)}"


def _by_budget(line: Mapping[str, Any], budgets: Sequence[float | None]) -> list[Facts | None]:
    points = {point["budget"]: point for point in line["points"]}
    return [points.get(budget) for budget in budgets]


def _cell(point: Facts | None, wanted: int) -> Text:
    score, *more = _words(point, wanted)
    return Text.assemble(score, *((f"\n{words}", "dim") for words in more))


def _words(point: Facts | None, wanted: int) -> list[str]:
    """Return a score, the epsilon that goes with it, and how many runs they are of if not of all."""
    if point is None or not point["runs"]:
        return [NONE]
    words = [with_spread(point)]
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
    if not lines:
        return False  # where nothing was run there is no metric either
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
    scale_axis(axes, every, bounded=bounded(facts["metric"]))
    if len(lines) > 1:
        place_legend(axes, lines)
    return True


def _place(point: Facts, infinity: float) -> float | None:
    """Return where a point stands; None where an epsilon was asked for and none can be stated."""
    if point["budget"] is None:
        return infinity
    claimed = finite(point["epsilon_max"])
    return math.log10(claimed) if claimed else None
