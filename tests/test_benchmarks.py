"""The benchmarks run, on sizes whose figures mean nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import aggregation, audit, batched, lora_fair_lambda, mixed_ranks

ROOT = Path(__file__).resolve().parents[1]


def test_each_benchmark_says_the_command_that_runs_it_and_pages_name_no_other() -> None:
    files = [path for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"]
    assert all(f"python -m benchmarks.{path.stem}" in path.read_text(encoding="utf-8") for path in files)
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert set(re.findall(r"python -m benchmarks\.(\w+)", pages)) <= {path.stem for path in files}
    assert "python benchmarks/" not in pages


def test_a_benchmark_that_uses_another_one_starts_as_a_module() -> None:
    command = [sys.executable, "-m", "benchmarks.regimes", "--help"]
    assert "--only" in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_aggregation_benchmark_has_all_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figures.json"
    aggregation.main(["--quick", "--json", str(written)])
    shown = capsys.readouterr().out
    assert "threads" in shown
    rows = json.loads(written.read_text())["rows"]
    for start in (
        *("lora-fair, times", "lora-fair, B against", "flexlora, times", "flexlora randomized, times"),
        *("flexlora randomized, clients alike", "flexlora randomized, clients that share nothing"),
        *("lora-lego, clients alike: time", "lora-lego, clients that share nothing: time"),
        *(f"{name}, extra memory" for name in aggregation.SINGLE_FACTORS),
        "fedit, streamed",
        *(f"{name}, log-log slope of time over {axis}" for name in aggregation.METHODS for axis in ("clients", "rank")),
    ):
        assert any(row["what"].startswith(start) for row in rows), start
    agreed = [row for row in rows if row["what"].startswith("lora-fair, B against")]
    assert all(row["passed"] for row in agreed)
    above = [row["value"] for row in rows if row["what"].startswith("flexlora, clients alike: |DW - sent|")]
    assert all(abs(value) < 1e-4 for value in above)


def test_growth_is_a_slope_on_logarithmic_axes() -> None:
    assert aggregation.slope([10, 20, 50], [1.0, 4.0, 25.0]) == pytest.approx(2.0)


def test_the_audit_benchmark_has_a_row_for_a_run() -> None:
    small = {"federation.rounds": 1, "run.evaluate_every": 1, "train.local_steps": 2, "privacy.canaries": 50}
    found = audit.audited({**audit.SETTINGS, **audit.CASES["no noise, no clipping"], **small})
    assert found["canaries"] == 50
    header, _, row = audit.table([{**found, "case": "no noise"}]).splitlines()
    assert row.startswith("| no noise | none | 0.000 |")
    assert header.count("|") == row.count("|")


def test_mixed_ranks_collapse_with_flexlora_and_not_with_raflora(monkeypatch: pytest.MonkeyPatch) -> None:
    flex, ra = (mixed_ranks.learn(name, 0, 12) for name in ("flexlora", "raflora"))
    assert flex.beyond < 0.5 < 0.7 < ra.beyond < 0.8  # 0.75 of the target
    assert ra.missed < 0.2 < flex.missed
    monkeypatch.setattr(mixed_ranks, "METHODS", ["hetlora"])
    rows = mixed_ranks.table(1, 1, lambda _: None).splitlines()
    assert rows[2] == "| the target | 0.75 | 0 |"
    assert [row.split(" | ")[0] for row in rows[3:]] == ["| hetlora", "| florist:padding=true,threshold=0.99"]


def test_the_low_rank_regression_has_a_cell_for_each_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_fair_lambda, "ROUNDS", 2)
    cells = lora_fair_lambda.regression(1).strip("| ").split(" | ")
    header = lora_fair_lambda.table([]).splitlines()[0].strip("| ").split(" | ")
    assert len(cells) == len(header)
    fedit, nearest = map(float, cells[-2:])
    assert 0 < nearest <= fedit < 1


def test_the_benchmark_of_clients_trained_together_times_them_against_one_by_one(tmp_path: Path) -> None:
    batched.main(["--clients", "4", "--sizes", "2", "--pairs", "1", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())
    times = found["cpu_milliseconds_a_client"]
    assert times.keys() == {"off", "2"}
    assert found["times_faster"]["2"] == pytest.approx(times["off"] / times["2"])
