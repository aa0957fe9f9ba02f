from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from fedpeft.data.partition import Partition
from fedpeft.data.splits import EncodedSplit
from fedpeft.report.plots import DARK, draw, plot_partition, write_plots
from fedpeft.runs.history import History

Events = Callable[..., list[dict[str, Any]]]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_gives_four_plots(events: Events, tmp_path: Path) -> None:
    write_plots(History.from_events(events(4, domains=True)), tmp_path / "plots")
    assert names(tmp_path / "plots") == {"accuracy.png", "loss.png", "aggregation_error.png", "communication.png"}
    with Image.open(tmp_path / "plots" / "accuracy.png") as image:
        assert image.size == (1008, 576)


def test_a_causal_run_plots_perplexity(events: Events) -> None:
    assert draw(History.from_events(events(2, causal=True)))[0].name == "perplexity"


def test_equal_histories_give_equal_bytes_whatever_the_users_style(events: Events) -> None:
    history = History.from_events(events(3, domains=True))
    before = draw(history)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30.0, "lines.linewidth": 9.0}):
        assert draw(history) == before
        assert matplotlib.rcParams["font.size"] == 30.0
    assert b"Software" not in before[0].png


def test_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys; from fedpeft.report.plots import draw; from fedpeft.runs.history import History;"
        "draw(History.from_events([{'event': 'evaluate', 'round': 0, 'loss': 1.0}]));"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_a_run_did_not_measure_is_not_plotted(events: Events) -> None:
    unevaluated = [event for event in events(2) if event["event"] != "evaluate"]
    for event in unevaluated:
        event.pop("aggregation_error", None)
        event.pop("aggregation_error_of_total", None)
    assert [plot.name for plot in draw(History.from_events(unevaluated))] == ["loss"]
    assert draw(History()) == []


def test_a_private_run_plots_epsilon_too_and_no_training_loss(events: Events) -> None:
    drawn = draw(History.from_events(events(3, private=True)))
    assert [plot.name for plot in drawn] == ["accuracy", "loss", "aggregation_error", "epsilon", "communication"]
    untested = [event for event in events(3, private=True) if event["event"] != "evaluate"]
    assert [plot.name for plot in draw(History.from_events(untested))] == ["aggregation_error", "epsilon"]


def test_domains_are_lines_of_their_own(events: Events) -> None:
    with_domains, without = (draw(History.from_events(events(0, domains=some)))[0] for some in (True, False))
    assert with_domains.name == without.name == "accuracy"
    assert with_domains.png != without.png


@pytest.mark.parametrize("count", [3, 20])
def test_foreign_domain_names_can_be_drawn(count: int) -> None:
    domains = [r"$\frac$", "_hidden", "日本", *(f"d{i}" for i in range(count - 3))]
    scores = {name: {"accuracy": 0.5 + 0.01 * i} for i, name in enumerate(domains)}
    events = [{"event": "evaluate", "round": at, "loss": 1.0, "accuracy": 0.5, "domains": scores} for at in (0, 1)]
    assert draw(History.from_events(events))[0].name == "accuracy"


def test_values_that_diverged_leave_gaps(events: Events) -> None:
    stream = events(3)
    for event in stream:
        if event["event"] == "round" and event["round"] == 2:
            event["train_loss"] = float("nan")
            event["aggregation_error"] = float("inf")
    assert len(draw(History.from_events(stream))) == 4


def test_an_exact_method_shows_no_error_rather_than_the_noise_of_rounding() -> None:
    def with_errors(*errors: float) -> bytes:
        rounds = [
            {"event": "round", "round": at, "aggregation_error": error} for at, error in enumerate(errors, start=1)
        ]
        (plot,) = draw(History.from_events(rounds))
        assert plot.name == "aggregation_error"
        return plot.png

    # at the same scale these differ by a thousandth of the axis; scaled to the data they would be mirrored
    assert _difference(with_errors(1e-9, 2e-9), with_errors(2e-9, 1e-9)) < 0.002
    assert _difference(with_errors(0.1, 0.2), with_errors(0.2, 0.1)) > 0.01


def _difference(first: bytes, second: bytes) -> float:
    one, two = (np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float) for png in (first, second))
    return float((np.abs(one - two) > 30).mean())


def test_the_dark_theme_has_dark_paper(events: Events) -> None:
    history = History.from_events(events(0))
    light, dark = (Image.open(io.BytesIO(draw(history, *theme)[0].png)).convert("L") for theme in ((), (DARK,)))
    assert light.getpixel((2, 2)) == 255
    assert np.asarray(dark)[2, 2] < 60


def test_a_folder_that_cannot_be_written_is_the_callers_problem(events: Events, tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(OSError, match="plots"):
        write_plots(History.from_events(events(1)), tmp_path / "plots")


@pytest.mark.parametrize(("clients", "num_labels"), [(6, 3), (100, 60), (1, 0)])
def test_a_plot_of_few_and_of_many_clients_is_drawn(tmp_path: Path, clients: int, num_labels: int) -> None:
    tensors = {"offsets": torch.arange(601)} | ({"labels": torch.arange(600) % num_labels} if num_labels else {})
    rows = np.array_split(np.random.default_rng(0).permutation(600), clients)
    divided = Partition(tuple(map(str, range(clients))), tuple(map(np.sort, rows)))
    train = EncodedSplit("sequence-classification", tensors, {})
    plot_partition(tmp_path / "plot.png", divided, train, tuple(f"label {index}" for index in range(num_labels)))
    with Image.open(tmp_path / "plot.png") as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    assert len([count for count, _ in colours if count > 200]) > min(num_labels, 20)
