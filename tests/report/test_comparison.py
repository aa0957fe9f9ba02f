"""The table of a comparison, made of facts that no run ever gave."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedpeft.report.comparison import comparison_markdown, comparison_table
from fedpeft.simulations.judging import comparison
from tests.report.printing import printed


def run(label: str, seed: int, score: float | None, **facts: Any) -> dict[str, Any]:
    known = {
        "own_rows": None,
        "worst_domain": None,
        "aggregation_error": 0.25,
        "bytes": 1_500_000,
        "seconds": 4.0,
        "epsilon": None,
    }
    return {
        "label": label,
        "seed": seed,
        "path": f"{label}/{seed}",
        "metric": "accuracy",
        "score": score,
        **known,
        **facts,
    }


LABELS = ["centralized", "local", "fedit", "fedit:server_optimizer=adam"]
RUNS = [
    run("centralized", 0, 0.9, aggregation_error=None, bytes=None),
    run("centralized", 1, 0.92, aggregation_error=None, bytes=None),
    run("local", 0, 0.5, aggregation_error=None, bytes=0),
    run("local", 1, 0.5, aggregation_error=None, bytes=0),
    run("fedit", 0, 0.7, aggregation_error=0.1, bytes=2_000_000, seconds=3.0),
    run("fedit", 1, 0.8, aggregation_error=0.3, bytes=4_000_000, seconds=5.0),
    run("fedit:server_optimizer=adam", 0, 0.75),
]


def test_means_and_spreads_are_those_of_the_seeds() -> None:
    facts = comparison(LABELS, [0, 1], 12, RUNS)
    rows = {row["method"]: row for row in facts["rows"]}
    assert rows["fedit"]["score"] == pytest.approx(0.75)
    assert rows["fedit"]["spread"] == pytest.approx(0.05 * 2**0.5)  # of the sample
    assert rows["fedit"]["aggregation_error"] == pytest.approx(0.2)
    assert rows["fedit"]["bytes"] == 3_000_000
    assert rows["local"]["spread"] == 0
    assert rows["fedit:server_optimizer=adam"]["spread"] is None
    json.dumps(facts)


def test_the_markdown_holds_every_method_and_explains_the_bounds() -> None:
    text = comparison_markdown(comparison(LABELS, [0, 1], 12, RUNS))
    lines = text.splitlines()
    assert lines[0] == "| method | accuracy | aggregation error | moved | time |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| centralized | 0.9100 ± 0.0141 | - | - | 4.0 s |"
    assert lines[3] == "| local | 0.5000 ± 0.0000 | - | 0 B | 4.0 s |"
    assert lines[4] == "| fedit | 0.7500 ± 0.0707 | 0.2000 | 3.0 MB | 4.0 s |"
    assert lines[5] == "| fedit:server_optimizer=adam (1 of 2 runs) | 0.7500 | 0.2500 | 1.5 MB | 4.0 s |"
    assert "After 12 rounds, means over seeds 0 to 1; ± is the sample standard deviation." in text
    assert "the upper bound" in text
    assert "the lower bound" in text


def test_one_seed_has_no_spread_and_no_bound_is_explained_that_is_not_there() -> None:
    facts = comparison(["fedit"], [7], 3, [run("fedit", 7, 0.7, worst_domain=0.6)])
    text = comparison_markdown(facts)
    assert "| fedit | 0.7000 | 0.6000 |" in text
    assert "± is" not in text
    assert "After 3 rounds, seed 7." in text
    assert "bound" not in text


def test_own_rows_have_a_column_where_they_were_scored() -> None:
    runs = [run("fedsa-lora", 0, 0.6, own_rows=0.9), run("fedsa-lora", 1, 0.6, own_rows=0.8), run("fedit", 0, 0.7)]
    facts = comparison(["fedsa-lora", "fedit"], [0, 1], 3, runs)
    assert facts["rows"][0]["own_rows"] == pytest.approx(0.85)
    text = comparison_markdown(facts)
    assert text.startswith("| method | accuracy | own rows | aggregation error |")
    assert "| fedsa-lora | 0.6000 ± 0.0000 | 0.8500 |" in text
    assert "by its own model where it has one; accuracy is on all test rows" in text
    wide = [run(each["label"], each["seed"], 0.5, own_rows=0.25, worst_domain=0.1) for each in RUNS]
    shown = printed(comparison_table(comparison(LABELS, [0, 1], 12, wide)), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "0.2500" in shown


def test_the_terminal_shows_the_same_within_80_columns() -> None:
    shown = printed(comparison_table(comparison(LABELS, [0, 1], 12, RUNS)), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("0.7500 ± 0.0707", "server_optimizer=adam", "3.0 MB"):
        assert text in shown


def test_nothing_done_is_a_table_too() -> None:
    facts = comparison(["fedit", "local"], [0, 1], 12, [])
    assert "| fedit (0 of 2 runs) |" in comparison_markdown(facts)
    printed(comparison_table(facts), width=80)


def test_private_runs_show_the_largest_epsilon_that_they_state() -> None:
    runs = [run("fedit", 0, 0.7, epsilon=2.9), run("fedit", 1, 0.7, epsilon=2.9981), run("local", 0, 0.5)]
    facts = comparison(["fedit", "local"], [0, 1], 12, runs)
    text = comparison_markdown(facts)
    assert "| method | accuracy | epsilon |" in text
    assert "| fedit | 0.7000 ± 0.0000 | 2.999 |" in text
    assert "privacy.json" in text
    assert "epsilon" not in comparison_markdown(comparison(LABELS, [0, 1], 12, RUNS))
