"""Metrics of rows' scores: each is a row of the registry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import tasks
from fedpeft.errors import ConfigError
from fedpeft.tasks.metrics import METRICS, Metric, Scores, find, measures_of, shown

OF_LABELS = measures_of(tasks.find("sequence-classification"))


@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0, 9)), min_size=1, max_size=30))
def test_every_metric_is_within_its_bounds(rows: list[tuple[int, int, float]]) -> None:
    predicted, labels, loss = (np.array(column) for column in zip(*rows, strict=True))
    measures = tuple(metric for metric in METRICS.ours.values() if metric.judge is None)
    scores = Scores(loss.astype(float), np.ones(len(rows)), measures, predicted, labels)
    for name, value in scores.metrics().items():
        low, high = find(name).bounds
        assert low <= value <= high, name


def test_accuracy_and_f1_are_those_of_the_labels_said() -> None:
    scores = Scores(np.ones(4), np.ones(4), OF_LABELS, np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))
    assert scores.metrics() == pytest.approx({"loss": 1.0, "accuracy": 0.75, "macro_f1": (1 + 2 / 3 + 2 / 3) / 3})


def test_a_perplexity_beyond_all_numbers_is_large_and_finite() -> None:
    scores = Scores(np.array([1e4]), np.ones(1), (find("perplexity"),))
    assert math.isfinite(scores.metrics()["perplexity"])


def test_the_loss_is_shown_last_and_what_is_no_metric_not_at_all() -> None:
    assert shown({"loss", "macro_f1", "round", "accuracy"}) == ["accuracy", "macro_f1", "loss"]
    with pytest.raises(ConfigError, match=r"unknown metric 'acuracy'\. Did you mean 'accuracy'\?"):
        find("acuracy")


def test_a_metric_of_a_ratio_is_the_ratio_of_sums_and_not_the_mean_of_ratios() -> None:
    half = Metric("half", "higher", (0.0, 1.0), ratio=lambda scores: (scores.loss, 2 * scores.tokens))
    assert half.of(Scores(np.array([1.0, 9.0]), np.array([1.0, 4.0]), ())) == 1.0
