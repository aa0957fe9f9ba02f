"""lm-eval on a run's model, against the scores of the run itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedpeft.errors import ConfigError, DataError
from fedpeft.harness import evaluate_tasks
from fedpeft.rescoring import rescore
from fedpeft.runs import read_events
from tests.generation.conftest import TASK


def test_lm_eval_scores_an_adapter_as_the_run_does_on_the_same_rows(
    taught: Path, table_jsonl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    # half of the rows have another answer than the one that was taught
    rows = [json.loads(line) for line in table_jsonl.read_text().splitlines()]
    for row in rows[::2]:
        row["completion"] = "w1 w2"
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "table.yaml").write_text(TASK.replace("ROWS", str(mixed)))
    facts = evaluate_tasks(run, str(tmp_path / "table.yaml"))
    assert capfd.readouterr() == ("", "")
    ours = rescore(run, {"data": {"test": str(mixed)}})
    assert facts["results"]["table"]["exact_match"] == ours["exact_match"] == 0.5
    assert json.loads((run / "lm_eval.json").read_text()) == facts
    assert read_events(run) == read_events(taught)


def test_a_task_file_that_is_not_there_is_refused_by_name(taught: Path) -> None:
    with pytest.raises(ConfigError, match=r"no task file 'nowhere\.yaml'"):
        evaluate_tasks(taught, "nowhere.yaml")


def test_no_task_and_a_task_that_raises_are_one_line(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no task"):
        evaluate_tasks(taught, " ,")
    (tmp_path / "bad.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "gone.jsonl")))
    with pytest.raises(DataError, match=r"^lm-eval cannot run its tasks: [^\n]*gone\.jsonl"):
        evaluate_tasks(taught, str(tmp_path / "bad.yaml"))
