"""Metrics, one row each, and the scores of single rows that they are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedpeft.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedpeft.tasks.task import Task

Ratio = Callable[["Scores"], "tuple[NDArray[np.float64], NDArray[np.float64]]"]


@dataclass(frozen=True)
class Metric:
    """One number that tells how good a model is.

    Parameters
    ----------
    name : str
        As records and tables call it.
    better : {"lower", "higher"}
        Which way is better.
    bounds : tuple of float
        Least and largest value that it can have.
    ratio : callable, optional
        Where it is a ratio of sums over rows: numerators and denominators of each row, ``(n,)``. Such a metric can be
        computed of rows that count differently, as a client's own mix of labels does.
    finish : callable
        What is done to the ratio.
    whole : callable, optional
        Where it is none: the metric of all rows.
    adds_to : collection of str
        Tasks that report it though they do not name it themselves: for metrics of other packages.
    """

    name: str
    better: Literal["lower", "higher"]
    bounds: tuple[float, float]
    ratio: Ratio | None = None
    finish: Callable[[float], float] = float
    whole: Callable[[Scores], float] | None = None
    adds_to: Collection[str] = ()

    def of(self, scores: Scores) -> float:
        """Compute it of all rows of the scores."""
        if self.whole is not None:
            return float(self.whole(scores))
        assert self.ratio is not None, f"metric '{self.name}' says not how it is computed"
        above, below = self.ratio(scores)
        return self.finish(float(above.sum() / below.sum()))


@dataclass(frozen=True)
class Scores:
    """One model's scores on each row of a split.

    Parameters
    ----------
    loss : array of float64, shape (n,)
        Sum of the row's losses; of likelihoods in nats.
    tokens : array of float64, shape (n,)
        What that sum counts: completion tokens, or 1.
    measures : tuple of Metric
        What is reported of them, see `measures_of`.
    predicted, labels : array, shape (n,), or None
        What the model says and what is right: label ids, or numbers.
    """

    loss: NDArray[np.float64]
    tokens: NDArray[np.float64]
    measures: tuple[Metric, ...]
    predicted: NDArray[np.generic] | None = None
    labels: NDArray[np.generic] | None = None

    def take(self, rows: NDArray[np.bool_]) -> Scores:
        """Return the scores of the rows of a mask."""
        predicted, labels = (None if values is None else values[rows] for values in (self.predicted, self.labels))
        return Scores(self.loss[rows], self.tokens[rows], self.measures, predicted, labels)

    def metrics(self) -> dict[str, float]:
        """Summarise all rows, by the names of the metrics."""
        return {metric.name: metric.of(self) for metric in self.measures}

    def by_group(self, groups: tuple[str, ...], wanted: Collection[str] | None = None) -> dict[str, dict[str, float]]:
        """Summarise the rows of each group, or of those wanted, such as a domain or a client; in sorted order."""
        import numpy as np

        names = np.asarray(groups)
        chosen = [str(name) for name in np.unique(names) if wanted is None or name in wanted]
        return {name: self.take(names == name).metrics() for name in chosen}


def _loss(scores: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return scores.loss, scores.tokens


def _hits(scores: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    hits = np.asarray(scores.predicted == scores.labels, dtype=np.float64)
    return hits, np.ones_like(hits)


def _macro_f1(scores: Scores) -> float:
    """Over labels that occur or are predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(scores.labels, scores.predicted, average="macro", zero_division=0.0))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # above that, floats end


LOSS = Metric("loss", "lower", (0.0, math.inf), ratio=_loss)
# in the order in which they are shown
METRICS = Registry(
    "metric",
    "fedpeft.metrics",
    (
        Metric("accuracy", "higher", (0.0, 1.0), ratio=_hits),
        Metric("perplexity", "lower", (1.0, math.inf), ratio=_loss, finish=_perplexity),
        Metric("macro_f1", "higher", (0.0, 1.0), whole=_macro_f1),
        LOSS,
    ),
)
find = METRICS.find


def shown(names: Collection[str]) -> list[str]:
    """Return those of some names that are metrics, in the order in which they are shown: the loss comes last."""
    return [name for name in [*(each for each in METRICS.all() if each != LOSS.name), LOSS.name] if name in names]


def measures_of(task: Task) -> tuple[Metric, ...]:
    """Return what is reported of a task: the loss, the task's own metrics, and what other packages add."""
    added = [metric for metric in METRICS.all().values() if task.name in metric.adds_to]
    return tuple({metric.name: metric for metric in (LOSS, *map(find, task.metrics), *added)}.values())
