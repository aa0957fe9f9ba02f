"""A task and a metric of somebody else's package: one file, named by an entry point, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedpeft import tasks
from fedpeft.config import nest, resolve
from fedpeft.report.page import write_report
from fedpeft.rescoring import rescore
from fedpeft.runs.history import History
from fedpeft.simulations.simulate import simulate
from fedpeft.tasks import metrics
from tests.tasks.rows import write_csv

REGRESSION = '''
"""A number for each text."""

import numpy as np

from fedpeft.data.columns import Column
from fedpeft.tasks import Task
from fedpeft.tasks.metrics import Metric


def encode(config, model_dir, inputs, place, rows):
    from fedpeft.data.tokens import encode_texts

    return encode_texts(config, model_dir, inputs, place, rows)


def squares(logits, targets):
    errors = (logits.squeeze(-1).float() - targets).double() ** 2
    return errors, errors.new_ones(errors.shape).long()


TASK = Task(
    name="sequence-regression",
    auto="AutoModelForSequenceClassification",
    peft="SEQ_CLS",
    columns=(Column("text", "text"), Column("label", "number")),
    encode=encode,
    losses=squares,
    metrics=("mae",),
    predict=lambda logits: logits.squeeze(-1).float(),
    settings={"num_labels": 1},
    reads_last_token=True,
)

MAE = Metric(
    "mae",
    "lower",
    (0.0, float("inf")),
    ratio=lambda scores: (np.abs(scores.predicted - scores.labels), np.ones(len(scores.labels))),
)
'''

BALANCED = """
from fedpeft.tasks.metrics import Metric


def recall(scores):
    from sklearn.metrics import balanced_accuracy_score

    return balanced_accuracy_score(scores.labels, scores.predicted)


METRIC = Metric("balanced", "higher", (0.0, 1.0), whole=recall, adds_to=("sequence-classification",))
"""


def install(folder: Path, module: str, source: str, entry_points: str, patch: pytest.MonkeyPatch) -> None:
    """Install a package of one file, as an installer leaves it."""
    (folder / f"{module}.py").write_text(source)
    described = folder / f"{module}-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(entry_points)
    patch.syspath_prepend(str(folder))


@pytest.fixture
def regression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "[fedpeft.tasks]\nsequence-regression = other_task:TASK\n[fedpeft.metrics]\nmae = other_task:MAE\n"
    install(tmp_path, "other_task", REGRESSION, entries, monkeypatch)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.usefixtures("regression")
@pytest.mark.parametrize("level", ["none", "record"])
def test_a_task_of_another_package_runs_from_the_rows_to_the_report(
    tmp_path: Path, tiny_bert: Path, level: str
) -> None:
    lengths = [1 + index % 7 for index in range(60)]
    texts = [" ".join(f"w{(index + at) % 60}" for at in range(n)) for index, n in enumerate(lengths)]
    columns = {"text": texts, "label": [f"{n / 7:.3f}" for n in lengths], "place": ["north", "south", "east"] * 20}
    rows = write_csv(tmp_path / "rows.csv", columns)
    settings = {
        "model.name": str(tiny_bert), "model.task": "sequence-regression", "data.source": str(rows),
        "federation.clients": 2, "federation.rounds": 2, "simulation.workers": 0, "adapter.rank": 2,
        "train.local_steps": 20, "train.batch_size": 8, "train.learning_rate": 0.02, "privacy.level": level,
        "data.domain": "place",
    }  # fmt: skip
    settings |= {"privacy.noise_multiplier": 0.5} if level == "record" else {}
    run = tmp_path / "run"
    simulate(resolve([nest(settings)]), run)
    first, *_, last = events(run, "evaluate")
    assert {"loss", "mae"} <= last.keys()
    assert not {"accuracy", "perplexity"} & last.keys()
    assert last["mae"] < first["mae"]
    if level == "none":
        assert events(run, "round")[0]["train_loss"] > last["loss"]
    assert rescore(run, {})["mae"] == pytest.approx(last["mae"], rel=1e-5)
    assert any("classifier" in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))
    assert History.read(run).metric == "mae"
    write_report(run)
    page = (run / "report.html").read_text()
    assert "Test rows of each domain; lower is better." in page
    assert "num_labels=1, ignore_mismatched_sizes=True" in page


def test_a_task_that_is_not_installed_is_unknown(tmp_path: Path) -> None:
    assert "sequence-regression" not in tasks.TASKS.all()
    assert "mae" not in metrics.METRICS.all()


def test_a_metric_of_another_package_is_reported_of_the_tasks_that_it_names(
    tmp_path: Path, tiny_bert: Path, text_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "other_metric", BALANCED, "[fedpeft.metrics]\nbalanced = other_metric:METRIC\n", monkeypatch)
    settings = {
        "model.name": str(tiny_bert), "data.source": str(text_csv), "partition.by": "client", "adapter.rank": 2,
        "federation.rounds": 1, "train.local_steps": 1, "simulation.workers": 0, "run.evaluate_clients": True,
    }  # fmt: skip
    run = tmp_path / "run"
    simulate(resolve([nest(settings)]), run)
    last = events(run, "evaluate")[-1]
    assert 0 <= last["balanced"] <= 1
    assert {"accuracy", "macro_f1", "balanced"} <= last["clients"]["scores"]["site-0"].keys()
    assert History.read(run).metrics == ["accuracy", "macro_f1", "balanced", "loss"]
