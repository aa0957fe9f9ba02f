"""The benchmarks run, on sizes whose figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import aggregation, audit


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
