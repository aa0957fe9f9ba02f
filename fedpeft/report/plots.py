"""A run's curves as PNG files: scores, losses and epsilon over rounds, the aggregation error, the score over bytes.

Figures are drawn with matplotlib's objects and its default style, whatever the user's settings: no global state is left
behind, and equal histories give equal bytes. Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/) or
close to them, which people with any colour vision can tell apart; lines differ in dashes too.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedpeft.data.partition import Partition, counts_by_value
from fedpeft.data.splits import EncodedSplit
from fedpeft.formats import finite, number, one_line
from fedpeft.runs import Event
from fedpeft.runs.history import ERRORS, History
from fedpeft.tasks.metrics import find

SIZE, DPI = (7.0, 4.0), 144  # inches, pixels per inch
NAMED_DOMAINS = 8  # with more than that lines cannot be told apart, and are drawn alike
MARKED_POINTS = 40  # up to this many each is marked
ROUNDING = 1e-5  # an aggregation error below this is float32's own
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Theme:
    """Colours of a plot: paper, ink, grid, and the lines' in order of use."""

    paper: str
    ink: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme("#ffffff", "#23272e", "#e3e6ea", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"))
DARK = Theme("#1b1f26", "#d7dce3", "#333a45", ("#56b4e9", "#e69f00", "#2fc49a", "#cc79a7", "#f0e442", "#5c9bff"))

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One figure, drawn.

    Parameters
    ----------
    name : str
        Stem of the file.
    title : str
        What it shows.
    png : bytes
        The image.
    """

    name: str
    title: str
    png: bytes


def draw(history: History, theme: Theme = LIGHT) -> list[Plot]:
    """Draw every figure that the history has data for.

    Parameters
    ----------
    history : History
        A run's, finished or not.
    theme : Theme
        Light or dark.

    Returns
    -------
    list of Plot
        The main metric, ``loss``, ``aggregation_error``, ``epsilon`` and ``communication``, those that
        have points.
    """
    figures: dict[str, tuple[str, Callable[[Axes], bool]]] = {}
    metric = history.metric
    if metric is not None:
        figures[metric] = (f"Test {metric} over rounds", lambda axes: _scores(axes, history, metric, theme))
    # in place of the score, where that is the loss
    figures["loss"] = ("Loss over rounds", lambda axes: _losses(axes, history, theme))
    figures["aggregation_error"] = ("Aggregation error", lambda axes: _errors(axes, history, theme))
    figures["epsilon"] = ("Epsilon over rounds, an upper bound", lambda axes: _epsilons(axes, history, theme))
    if metric is not None:
        title = f"Test {metric} over bytes moved"
        figures["communication"] = (title, lambda axes: _communication(axes, history, metric, theme))
    drawn = []
    for name, (title, fill) in figures.items():
        png = render_figure(title, fill, theme)
        if png is not None:
            drawn.append(Plot(name, title, png))
    return drawn


def write_plots(history: History, folder: Path) -> list[Plot]:
    """Write every figure that the history has data for into a folder.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    plots = draw(history)
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        partial = folder / f".{plot.name}.png"
        partial.write_bytes(plot.png)
        partial.replace(folder / f"{plot.name}.png")  # whoever watches a run never sees half an image
    return plots


# --- figures -----------------------------------------------------------------------------------------------------


def _scores(axes: Axes, history: History, metric: str, theme: Theme) -> bool:
    points = _series(history.evaluations, metric)
    domains = _domains(history, metric)
    lines = [draw_line(axes, points, short_label("all test rows", points), theme, 0, width=2.4)]
    if len(domains) <= NAMED_DOMAINS:
        for index, (name, values) in enumerate(domains.items(), start=1):
            lines.append(draw_line(axes, values, short_label(name, values), theme, index, width=1.1))
    else:
        for values in domains.values():
            axes.plot(*zip(*values, strict=True), color=theme.ink, alpha=0.3, linewidth=0.8, zorder=1)
        lines.append(axes.lines[-1])
        axes.lines[-1].set_label(f"each of {len(domains)} domains")
    axes.set_ylabel(metric)
    everything = [*points, *(point for values in domains.values() for point in values)]
    scale_axis(axes, everything, bounded=bounded(metric))
    return _finish(axes, lines, points)


def _losses(axes: Axes, history: History, theme: Theme) -> bool:
    tested, trained = _series(history.evaluations, "loss"), _series(history.rounds, "train_loss")
    lines = [
        draw_line(axes, points, short_label(name, points), theme, index, width=width)
        for index, (name, points, width) in enumerate((("test", tested, 2.4), ("clients' training", trained, 1.6)))
        if points
    ]
    axes.set_ylabel("loss")
    scale_axis(axes, [*tested, *trained])
    return _finish(axes, lines, [*tested, *trained])


def _errors(axes: Axes, history: History, theme: Theme) -> bool:
    points, whole = (_series(history.rounds, name) for name in ERRORS)
    series = {"of the round's own step": points, "of all learned so far": whole}
    lines = [
        draw_line(axes, values, short_label(name, values), theme, index, width=2.0 - 0.6 * index)
        for index, (name, values) in enumerate(series.items())
        if values
    ]
    points = [*points, *whole]
    axes.set_ylabel("|mean of updates - sent|, relative")
    if points and max(value for _, value in points) < ROUNDING:
        axes.set_ylim(0, ROUNDING)
        axes.set_yticks([0.0])
        axes.text(0.5, 0.5, "zero up to rounding", transform=axes.transAxes, ha="center", color=theme.ink)
    else:
        scale_axis(axes, points)
    return _finish(axes, lines, points)


def _epsilons(axes: Axes, history: History, theme: Theme) -> bool:
    points = _series(history.rounds, "epsilon_max")
    draw_line(axes, points, "", theme, 0, width=2.0)
    axes.set_ylabel("epsilon of the client that spent most")
    scale_axis(axes, points)
    return _finish(axes, [], points)


def _communication(axes: Axes, history: History, metric: str, theme: Theme) -> bool:
    scores = _series(history.evaluations, metric)
    points = [(history.bytes_until(int(at)) / 1e6, value) for at, value in scores]
    if not any(moved > 0 for moved, _ in points):
        return False
    draw_line(axes, points, "", theme, 0, width=2.0)
    axes.set_ylabel(metric)
    scale_axis(axes, points, bounded=bounded(metric))
    _finish(axes, [], points)
    axes.set_xlabel("MB moved, up and down together")
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    return True


# --- parts -------------------------------------------------------------------------------------------------------


def _series(events: Mapping[int, Event], key: str) -> Points:
    known = ((at, finite(event.get(key))) for at, event in sorted(events.items()))
    return [(at, value) for at, value in known if value is not None]


def _domains(history: History, metric: str) -> Mapping[str, Points]:
    by_domain: dict[str, list[tuple[float, float]]] = {}
    for at, event in sorted(history.evaluations.items()):
        domains = event.get("domains")
        for name, scores in domains.items() if isinstance(domains, Mapping) else ():
            value = finite(scores.get(metric)) if isinstance(scores, Mapping) else None
            if value is not None:
                by_domain.setdefault(str(name), []).append((at, value))
    return by_domain


def short_label(name: str, points: Points = (), limit: int = 18) -> str:
    """Return a line's name for the legend, with its last value if points are given."""
    # matplotlib reads $...$ as mathematics and hides names that begin with an underscore
    shown = one_line(name, limit).replace("$", r"\$")
    return f" {shown}  {number(points[-1][1])}" if points else f" {shown}"


def draw_line(axes: Axes, points: Points, label: str, theme: Theme, index: int, *, width: float) -> Any:
    """Draw the line of this index, in its colour and dashes; the first lies on top."""
    (line,) = axes.plot(
        [at for at, _ in points],
        [value for _, value in points],
        color=theme.lines[index % len(theme.lines)],
        linestyle=DASHES[index % len(DASHES)],
        linewidth=width,
        marker="o" if len(points) <= MARKED_POINTS else None,
        markersize=2 + width,
        label=label,
        zorder=4 if index == 0 else 3,
    )
    return line


def bounded(metric: str) -> bool:
    """Tell whether a metric ends at 1."""
    return find(metric).bounds[1] == 1.0


def scale_axis(axes: Axes, points: Points, *, bounded: bool = False) -> None:
    """Scale the vertical axis to what is drawn; a bounded score ends at 1."""
    values = [value for _, value in points]
    if not bounded and values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    elif values and min(values) >= 0:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.05 * max(high, 1e-9)
        ceiling = high + margin
        axes.set_ylim(max(0.0, low - margin), min(1.0, ceiling) + 0.005 if bounded and high <= 1 else ceiling)


def _finish(axes: Axes, lines: Sequence[Any], points: Points) -> bool:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if len(lines) > 1:
        place_legend(axes, lines)
    return bool(points)


def place_legend(axes: Axes, lines: Sequence[Any]) -> None:
    """Name lines beside the plot, each in its own colour."""
    axes.legend(
        handles=lines,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        labelcolor="linecolor",
        fontsize=9,
        handlelength=1.8,
    )


def render_figure(title: str, fill: Callable[[Axes], bool], theme: Theme) -> bytes | None:
    """Return one plot as PNG; None if what fills it finds nothing to draw."""
    with _default_style():
        figure = Figure(figsize=SIZE, dpi=DPI, facecolor=theme.paper)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor=theme.paper)
        # where it stands anyway: left to find that, matplotlib lays the axes out a second time
        axes.set_title(title, loc="left", y=1.0, color=theme.ink, fontweight="bold", fontsize=11)
        axes.grid(color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.grid)
        axes.tick_params(which="both", colors=theme.ink, length=0)
        if not fill(axes):
            return None
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(theme.ink)
        # fixed margins: asking matplotlib to find them takes as long again as drawing
        figure.subplots_adjust(left=0.115, bottom=0.125, top=0.9, right=0.97 if axes.get_legend() is None else 0.68)
        png = io.BytesIO()
        canvas.print_png(png, metadata={"Software": None})  # else a new matplotlib changes every file
        return png.getvalue()


@contextlib.contextmanager
def _default_style() -> Iterator[None]:
    with matplotlib.style.context("default"), warnings.catch_warnings():
        # a domain's name in letters that the font lacks is drawn as boxes, which is no news to the user
        warnings.filterwarnings("ignore", message=".*missing from font", category=UserWarning)
        yield


# --- who holds what ------------------------------------------------------------------------------------------------


def plot_partition(path: Path, partition: Partition, train: EncodedSplit, labels: Sequence[str] = ()) -> None:
    """Draw how many rows of each label, and of each domain, every client holds.

    Parameters
    ----------
    path : Path
        Image to write; its suffix names the format.
    partition : Partition
        The partition.
    train : EncodedSplit
        The rows that it divides.
    labels : sequence of str
        Label names in the order of their ids.
    """
    sizes = np.array([[len(rows)] for rows in partition.indices])
    panels = counts_by_value(partition, train, labels) or [("rows", ("rows",), sizes)]
    clients = len(partition.client_ids)
    figure = Figure(figsize=(min(14.0, 5.0 + 0.12 * clients), 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (title, names, counts) in enumerate(panels, start=1):
        axes = figure.add_subplot(len(panels), 1, panel)
        palette = colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "viridis"]
        colours = [palette(index if len(names) <= 20 else index / (len(names) - 1)) for index in range(len(names))]
        across = np.arange(clients)[:, None] + np.array([-0.42, 0.42, 0.42, -0.42])  # (clients, 4): corners of a bar
        tops = np.cumsum(counts, axis=1)  # (clients, values)
        for value, (name, colour) in enumerate(zip(names, colours, strict=True)):
            top = tops[:, value]
            base = top - counts[:, value]
            corners = np.stack([across, np.stack([base, base, top, top], axis=1)], axis=2)  # (clients, 4, 2)
            # one shape a value: thousands of single bars would take a minute
            axes.add_collection(PolyCollection(list(corners), facecolors=[colour], label=name), autolim=False)
        axes.set_ylim(0, 1.05 * tops.max())
        every = -(-clients // 25)  # as many names as stay legible
        axes.set_xticks(np.arange(0, clients, every), partition.client_ids[::every])
        if max(map(len, partition.client_ids)) > 3 and clients > 6:
            axes.tick_params(axis="x", rotation=60)
        axes.set_xlim(-0.6, clients - 0.4)
        axes.set(xlabel="client", ylabel="training rows")
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            # of very many names, the first and the last say what the colours run from and to
            bars, texts = axes.get_legend_handles_labels()
            shown = range(len(names)) if len(names) <= 20 else np.linspace(0, len(names) - 1, 8).astype(int)
            axes.legend(
                [bars[index] for index in shown],
                [texts[index] if len(texts[index]) <= 24 else f"{texts[index][:23]}\u2026" for index in shown],
                title=title,
                loc="upper left",
                bbox_to_anchor=(1.0, 1.0),
                frameon=False,
                fontsize="small",
            )
    figure.savefig(path, dpi=130)
