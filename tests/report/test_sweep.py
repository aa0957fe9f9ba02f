"""The table and the plot of a sweep, made of facts that no run ever gave."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fedpeft.config import nest, resolve
from fedpeft.report.plots import LIGHT
from fedpeft.report.sweep import _curves, sweep_markdown, sweep_plot, sweep_table
from fedpeft.simulations.judging import sweep
from tests.report.printing import joined, printed

STATEMENT = {
    "level": "record", "delta": 1e-5, "accountant": "prv", "adjacency": "one row more or less",
    "reasons": ["it is seeded"], "warnings": [],
}  # fmt: skip


def points(*budgets: float | None) -> list[dict[str, Any]]:
    return [
        {"label": f"{adapter}-{strategy}-{budget}", "adapter": adapter, "strategy": strategy, "budget": budget}
        for adapter in ("lora", "ffa-lora")
        for strategy in ("fedit", "lora-fair:solver=cosine")
        for budget in budgets
    ]


def run(label: str, seed: int, score: float | None, epsilon: float | None = None) -> dict[str, Any]:
    return {"label": label, "seed": seed, "metric": "accuracy", "score": score, "epsilon": epsilon}


RUNS = [
    run("lora-fedit-None", 0, 0.9),
    run("lora-fedit-None", 1, 0.9),
    run("lora-fedit-3.0", 0, 0.7, 2.9),
    run("lora-fedit-3.0", 1, 0.8, 2.9981),
    run("lora-fedit-1.0", 0, 0.6, 0.99),
    run("ffa-lora-fedit-3.0", 0, 0.7, 2.9),
    run("ffa-lora-fedit-3.0", 1, 0.7, None),
]


def facts(*budgets: float | None) -> dict[str, Any]:
    return sweep(points(*budgets), [0, 1], 12, RUNS, [STATEMENT])


def test_cells_hold_means_spreads_and_the_epsilon_that_runs_state() -> None:
    found = facts(None, 3.0, 1.0)
    assert found["budgets"] == [1.0, 3.0, None]
    lines = sweep_markdown(found).splitlines()
    assert lines[2] == "| adapter | strategy | budget 1 | budget 3 | no privacy |"
    cells = "| 0.6000, epsilon 0.990, 1 of 2 runs | 0.7500 ± 0.0707, epsilon 2.999 | 0.9000 ± 0.0000 |"
    assert lines[4] == f"| lora | fedit {cells}"
    json.dumps(found, allow_nan=False)


def test_one_run_that_states_no_epsilon_leaves_none_to_be_shown() -> None:
    assert "| ffa-lora | fedit | 0.7000 ± 0.0000, epsilon - |" in sweep_markdown(facts(3.0))


def test_the_notes_say_what_all_epsilons_rest_on() -> None:
    text = joined(printed(sweep_table(facts(3.0, None))))
    for expected in (
        "After 12 rounds, means over seeds 0 to 1",
        "Privacy of level record at delta = 1e-05 (PRV); neighbours: one row more or less. No guarantee: it is seeded.",
        "no privacy: privacy.level = none",
        "Each epsilon is of one run alone",
    ):
        assert expected in text
    assert "no privacy" not in printed(sweep_table(facts(3.0)))


def test_the_terminal_shows_three_budgets_within_80_columns() -> None:
    shown = printed(sweep_table(facts(1.0, 3.0, None)), width=80)
    for expected in ("0.7500 ± 0.0707", "epsilon 2.999", "solver=cosine", "ffa-lora"):
        assert expected in shown


def test_the_plot_has_an_axis_that_holds_infinity_and_equal_facts_give_equal_bytes() -> None:
    drawn = sweep_plot(facts(1.0, 3.0, None))
    assert drawn is not None
    with Image.open(io.BytesIO(drawn)) as image:
        assert image.size == (1008, 576)
    assert drawn == sweep_plot(facts(1.0, 3.0, None))
    assert drawn != sweep_plot(facts(1.0, 3.0))
    assert sweep_plot(facts(3.0)) is not None


def test_nothing_done_is_a_table_and_no_plot() -> None:
    empty = sweep(points(1.0, None), [0], 12, [], [])
    assert "| lora | fedit | - | - |" in sweep_markdown(empty)
    printed(sweep_table(empty))
    assert sweep_plot(empty) is None


def test_no_line_leads_to_infinity() -> None:
    axes = Figure().add_subplot()
    _curves(axes, facts(1.0, 3.0, None), LIGHT)
    drawn = [np.asarray(line.get_xydata(), dtype=float) for line in axes.lines]
    places, scores = next(points for points in drawn if len(points) == 4).T
    assert np.isnan(places).tolist() == [False, False, True, False]
    assert [*scores[:2], scores[3]] == [0.6, 0.75, 0.9]


def test_an_adapter_that_was_left_open_is_the_one_that_the_runs_had(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(resolve([nest({"adapter.kind": "ffa-lora"})]).to_toml())
    left = [{"label": str(budget), "adapter": None, "strategy": "fedit", "budget": budget} for budget in (3.0, None)]
    done = [run("3.0", 0, 0.7, 2.9) | {"path": str(tmp_path)}]
    assert [line["adapter"] for line in sweep(left, [0], 12, done, [])["lines"]] == ["ffa-lora"]
    assert [line["adapter"] for line in sweep(left, [0], 12, [], [])["lines"]] == [None]


def test_the_accountants_that_are_named_are_those_that_computed() -> None:
    told = [STATEMENT | {"computed_by": [name]} for name in ("rdp", "gaussian")]
    assert "(the analytic Gaussian and RDP)" in sweep_markdown(sweep(points(3.0), [0, 1], 12, RUNS, told))
