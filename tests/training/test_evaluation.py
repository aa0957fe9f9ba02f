from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import tasks
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import ConfigError
from fedpeft.resident import Resident
from fedpeft.tasks.metrics import Scores, measures_of
from fedpeft.training.evaluation import batches_within, client_metrics, mean_and_worst, score

Make = Callable[..., RunConfig]

SCORES = Scores(
    loss=np.array([1.0, 2.0, 3.0, 6.0]),
    tokens=np.ones(4),
    measures=measures_of(tasks.find("sequence-classification")),
    predicted=np.array([0, 1, 1, 0]),
    labels=np.array([0, 1, 0, 1]),
)


def test_metrics_are_means_over_the_rows_asked_for() -> None:
    assert SCORES.metrics() == {"loss": 3.0, "accuracy": 0.5, "macro_f1": 0.5}
    assert SCORES.take(np.array([True, True, False, False])).metrics()["accuracy"] == 1.0
    assert SCORES.by_group(("b", "b", "a", "a"))["a"]["loss"] == 4.5


def test_perplexity_counts_tokens_not_rows() -> None:
    scores = Scores(
        loss=np.array([1.0, 9.0]), tokens=np.array([1.0, 4.0]), measures=measures_of(tasks.find("causal-lm"))
    )
    assert scores.metrics()["perplexity"] == pytest.approx(np.exp(2.0))


class Labelled:
    """A split of which only the labels count."""

    clients = domains = None

    def __init__(self, labels: list[int]) -> None:
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)


def test_a_client_without_test_rows_of_its_own_is_scored_by_its_mix_of_labels() -> None:
    test, train = Labelled([0, 1, 0, 1]), Labelled([0, 0, 0, 1])
    held = SimpleNamespace(client_ids=("x", "y"), indices=(np.array([0, 1, 2, 3]), np.array([3])))
    found = client_metrics(SCORES, test, train, held)  # type: ignore[arg-type]
    assert found["x"]["accuracy"] == pytest.approx(0.75 * 0.5 + 0.25 * 0.5)
    assert found["x"]["loss"] == pytest.approx(0.75 * 2.0 + 0.25 * 4.0)
    assert found["y"]["loss"] == pytest.approx(4.0)
    only = client_metrics(SCORES, test, train, held, clients={"y"})  # type: ignore[arg-type]
    assert only == {"y": found["y"]}
    named = SimpleNamespace(clients=("x", "y", "y", "x"))
    assert client_metrics(SCORES, named, train, held, clients={"y"}).keys() == {"y"}  # type: ignore[arg-type]


def test_rows_of_no_kind_cannot_be_scored_by_client() -> None:
    bare = SimpleNamespace(clients=None, domains=None, labels=None)
    with pytest.raises(ConfigError, match=r"run\.evaluate_clients needs"):
        client_metrics(SCORES, bare, bare, SimpleNamespace(client_ids=(), indices=()))  # type: ignore[arg-type]


def test_the_worst_tenth_is_at_least_one_and_lowest_for_accuracy_highest_for_loss() -> None:
    values = {str(i): {"accuracy": i / 20, "loss": i / 20} for i in range(20)}
    assert mean_and_worst(values, "accuracy")["worst_tenth"] == pytest.approx(0.5 / 20)
    assert mean_and_worst(values, "loss")["worst_tenth"] == pytest.approx(18.5 / 20)
    assert mean_and_worst({"a": {"accuracy": 0.3}}, "accuracy") == {"mean": 0.3, "worst_tenth": 0.3}


def test_batches_do_not_change_scores(text_config: Make) -> None:
    home = Resident(text_config())
    one, many = (score(home.adapted.model, home.test, text_config(run__evaluate_batch_size=size)) for size in (1, 50))
    np.testing.assert_allclose(one.loss, many.loss, rtol=1e-5)


def test_batches_hold_no_more_tokens_than_allowed_but_one_row_at_least() -> None:
    split: Any = SimpleNamespace(lengths=np.array([3, 9, 2, 2, 4, 5]))
    assert [rows.tolist() for rows in batches_within(split, 3, 8)] == [[2, 3], [0, 4], [5], [1]]
    assert [rows.tolist() for rows in batches_within(split, 2, 1000)] == [[2, 3], [0, 4], [5, 1]]
    split.lengths = np.zeros(0, np.int64)
    assert batches_within(split, 3, 8) == []


def test_a_language_model_is_scored_on_its_completions_alone(tiny_llama: Path, pairs_jsonl: Path) -> None:
    config = resolve(
        [
            nest(
                {
                    "model.name": str(tiny_llama), "data.source": str(pairs_jsonl), "data.completion": "completion",
                    "federation.clients": 2, "adapter.rank": 2,
                }
            )
        ]
    )  # fmt: skip
    home = Resident(config)
    scores = score(home.adapted.model, home.test, config)
    for row in range(3):
        inputs = home.test.batch([row])
        labels = inputs.pop("labels")[0]
        with torch.no_grad():
            log_p = home.adapted.model(**inputs).logits[0].log_softmax(-1)
        counted = [t for t in range(1, len(labels)) if labels[t] != -100]
        assert scores.tokens[row] == len(counted)
        assert scores.loss[row] == pytest.approx(-sum(float(log_p[t - 1, labels[t]]) for t in counted), rel=1e-5)
