"""The figures of docs/performance.md, drawn from the JSON files that the benchmarks wrote, and its tables.

python -m benchmarks.draw [--results FOLDER] [--out docs/performance.svg]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Drawing

from benchmarks.methods import between
from benchmarks.record import RESULTS, ROOT, read, shown

DOCUMENT = ROOT / "docs" / "performance.md"
IMAGE = ROOT / "docs" / "performance.svg"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
Kept = Mapping[str, Any]


def _peer(axes: Axes, kept: Kept) -> None:
    """Accuracy over the time since the command."""
    for index, (name, run) in enumerate(kept["runs"].items()):
        dashes = "-" if name.startswith("fedpeft") else "--"
        axes.plot(run["at_s"], run["accuracy"], dashes, marker="o", markersize=3, color=COLOURS[index], label=name)
    axes.set(title="Accuracy over time, one job", xlabel="seconds since the command", ylabel="accuracy")


def _engine(axes: Axes, kept: Kept) -> None:
    """Seconds of a round over the bytes of a message."""
    points = kept["points"]
    for index, side in enumerate(dict.fromkeys(each["side"] for each in points)):
        own = [each for each in points if each["side"] == side]
        name = {"ray": "fedpeft on Ray", "inline": "fedpeft in one process", "flower": "Flower's runtime"}[side]
        axes.plot(
            [each["bytes"] / 1e6 for each in own],
            [each["seconds"] for each in own],
            marker="o",
            color=COLOURS[index],
            label=name,
        )
    axes.set(xscale="log", yscale="log", title=f"A round of {points[0]['clients']} echoing clients")
    axes.set(xlabel="MB a message", ylabel="seconds")


def _memory(axes: Axes, kept: Kept) -> None:
    """The driver's memory over the bytes of a message."""
    points = kept["points"]
    for index, side in enumerate(dict.fromkeys(each["side"] for each in points)):
        own = [each for each in points if each["side"] == side]
        axes.plot(
            [each["bytes"] / 1e6 for each in own],
            [each["peak"] / 1e9 for each in own],
            marker="o",
            color=COLOURS[index],
            label={"ray": "fedpeft on Ray", "inline": "fedpeft in one process", "flower": "Flower's runtime"}[side],
        )
    axes.set(xscale="log", title="The driver's memory", xlabel="MB a message", ylabel="GB")


def _cohorts(axes: Axes, kept: Kept) -> None:
    """The driver's memory over the number of clients."""
    some = [each for each in kept["points"] if each["cohort"] < each["clients"] or each["clients"] == 100]
    full = [each for each in kept["points"] if each not in some]
    for index, (points, name) in enumerate(((some, "100 a round"), (full, "all in one round"))):
        xs, ys = ([each[key] for each in points] for key in ("clients", "driver_gb"))
        axes.plot(xs, ys, marker="o", color=COLOURS[index], label=name)
    axes.set(xscale="log", title="The driver's memory over clients", xlabel="clients", ylabel="GB")
    axes.set_ylim(bottom=0)


def _scaling(axes: Axes, kept: Kept) -> None:
    """Clients a minute over workers, and what is ideal."""
    points = kept["points"]
    workers = [each["workers"] for each in points]
    found = [each["clients_a_minute"] for each in points]
    ideal = [each["clients_a_minute"] * each["rounds_s"] / each["ideal_s"] for each in points]
    axes.plot(workers, ideal, "--", color=COLOURS[1], label="the clients' own time / workers")
    axes.plot(workers, found, marker="o", color=COLOURS[0], label="seen")
    axes.set(title="Throughput", xlabel="workers", ylabel="clients a minute", xticks=workers)
    axes.set_ylim(bottom=0)


PANELS: Sequence[tuple[str, Callable[[Axes, Kept], None]]] = (
    ("peer", _peer),
    ("scaling", _scaling),
    ("engine", _engine),
    ("engine", _memory),
    ("cohorts", _cohorts),
)


def draw(results: Path = RESULTS, out: Path = IMAGE) -> list[str]:
    """Draw what there are results for; return the benchmarks that were drawn."""
    there = [(name, panel) for name, panel in PANELS if (results / f"{name}.json").is_file()]
    if not there:
        return []
    with matplotlib.rc_context({"svg.hashsalt": "fedpeft", "font.size": 9}):
        rows = (len(there) + 1) // 2
        drawing = Drawing(figsize=(9.5, 3.2 * rows), layout="constrained")
        canvas = FigureCanvasSVG(drawing)
        for index, (name, panel) in enumerate(there):
            axes = drawing.add_subplot(rows, 2, index + 1)
            panel(axes, read(results / f"{name}.json"))
            axes.legend(frameon=False, fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        canvas.print_svg(out, metadata={"Date": None})
    return [name for name, _ in there]


def table_of(kept: Kept) -> str:
    """Return a benchmark's figures as a table, and on which machine they were seen when."""
    lines = ["| what | seen | target |", "|---|---|---|"]
    for figure in kept["figures"]:
        met = {None: "", True: ", reached", False: ", **not reached**"}[figure.met]
        detail = ", ".join(f"{key} {_short(value)}" for key, value in figure.detail.items() if _is_short(value))
        seen = shown(figure.value, figure.unit) + (f" ({detail})" if detail else "")
        lines.append(f"| {figure.what} | {seen} | {figure.wanted}{met} |")
    machine = kept["machine"]
    gigabytes, units = f"{machine['memory_gb']:.0f} GB", ", ".join(machine["units"]) or "no vector units"
    lines += ["", f"{kept['when'][:10]}, {machine['cores']} cores of {machine['processor']} ({units}), {gigabytes}; "]
    lines[-1] += f"load before: {machine['load_before']:g}."
    return "\n".join(lines)


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float)


def _short(value: float) -> str:
    return f"{value / 1e6:.0f} MB" if value > 1e6 else shown(value, "")


def write_tables(results: Path = RESULTS, document: Path = DOCUMENT) -> None:
    """Write each benchmark's table between its marks, ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""
    text = document.read_text(encoding="utf-8")
    for path in sorted(results.glob("*.json")):
        if f"<!-- {path.stem} -->" in text:
            text = between(text, path.stem, table_of(read(path)))
    document.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGE)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    given = parser.parse_args(arguments)
    print("drawn:", ", ".join(draw(given.results, given.out)) or "nothing, since there are no results")
    write_tables(given.results, given.document)


if __name__ == "__main__":
    main()
