"""Metrics, one row each, and the scores of single rows that they are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from fedpeft.errors import ConfigError
from fedpeft.registry import Registry
from fedpeft.tasks import answers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedpeft.config import RunConfig
    from fedpeft.tasks.task import Task

Ratio = Callable[["Scores"], "tuple[NDArray[np.float64], NDArray[np.float64]]"]
Judge = Callable[[Sequence[str], Sequence[str]], "NDArray[np.float64]"]


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
    judge : callable, optional
        Where it is of texts that the model writes: what each answer is worth, held against its reference, ``(n, k)``.
        It is asked once a row, of whoever wrote the answer; `Scores.marks` has what it returned. Such a metric is
        reported where ``data.metric`` names it.
    chosen : bool
        Whether what it judges is not written but chosen, the likeliest of the answers that the test rows have.
    needs : str, optional
        Package that judges, of the extra ``metrics``.
    runs_code : bool
        Whether judging runs what the model wrote.
    """

    name: str
    better: Literal["lower", "higher"]
    bounds: tuple[float, float]
    ratio: Ratio | None = None
    finish: Callable[[float], float] = float
    whole: Callable[[Scores], float] | None = None
    adds_to: Collection[str] = ()
    judge: Judge | None = None
    chosen: bool = False
    needs: str | None = None
    runs_code: bool = False

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
    marks : mapping of str to array of float64, shape (n, k)
        By metric, what the texts that the model wrote are worth; NaN in rows that it was not asked.
    """

    loss: NDArray[np.float64]
    tokens: NDArray[np.float64]
    measures: tuple[Metric, ...]
    predicted: NDArray[np.generic] | None = None
    labels: NDArray[np.generic] | None = None
    marks: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def take(self, rows: NDArray[np.bool_]) -> Scores:
        """Return the scores of the rows of a mask."""
        predicted, labels = (None if values is None else values[rows] for values in (self.predicted, self.labels))
        marks = {name: values[rows] for name, values in self.marks.items()}
        return Scores(self.loss[rows], self.tokens[rows], self.measures, predicted, labels, marks)

    def judged(self, marks: Mapping[str, NDArray[np.float64]]) -> Scores:
        """Return them with what the model's texts are worth."""
        return replace(self, measures=(*self.measures, *map(find, marks)), marks=marks)

    def answered(self, metric: Metric) -> Scores:
        """Return the scores of the rows that a metric can be computed of: all, or those that were answered."""
        if metric.judge is None:
            return self
        rows = _answered(self.marks[metric.name])
        return self if rows.all() else self.take(rows)

    def metrics(self) -> dict[str, float]:
        """Summarise all rows, by the names of the metrics; without those of which no row was answered."""
        parts = ((metric, self.answered(metric)) for metric in self.measures)
        return {metric.name: metric.of(part) for metric, part in parts if len(part.loss)}

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


def _answered(marks: NDArray[np.float64]) -> NDArray[np.bool_]:
    import numpy as np

    found: NDArray[np.bool_] = ~np.isnan(marks[:, 0])
    return found


def _of_answers(name: str, judge: Judge, **facts: Any) -> Metric:
    """Return a metric that is the mean over rows of what each answer is worth, between 0 and 1."""

    def ratio(scores: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        import numpy as np

        worth = scores.marks[name][:, 0]
        return worth, np.ones_like(worth)

    return Metric(name, "higher", (0.0, 1.0), ratio=ratio, judge=judge, **facts)


def _bleu(scores: Scores) -> float:
    return answers.bleu_of(scores.marks["bleu"])


LOSS = Metric("loss", "lower", (0.0, math.inf), ratio=_loss)
# in the order in which they are shown
METRICS = Registry(
    "metric",
    "fedpeft.metrics",
    (
        Metric("accuracy", "higher", (0.0, 1.0), ratio=_hits),
        Metric("perplexity", "lower", (1.0, math.inf), ratio=_loss, finish=_perplexity),
        Metric("macro_f1", "higher", (0.0, 1.0), whole=_macro_f1),
        _of_answers("exact_match", answers.exact_match),
        _of_answers("f1", answers.token_f1),
        _of_answers("rouge", answers.rouge_l, needs="rouge_score"),
        Metric("bleu", "higher", (0.0, 100.0), whole=_bleu, judge=answers.bleu_parts, needs="sacrebleu"),
        _of_answers("choice_accuracy", answers.choice_accuracy),
        _of_answers("choice_likelihood", answers.same, chosen=True),
        _of_answers("pass", answers.passes, runs_code=True),
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


def asked(config: RunConfig, task: Task) -> tuple[Metric, ...]:
    """Return the metrics of texts that ``data.metric`` names, in its order.

    Raises
    ------
    ConfigError
        One that judges no texts, for a task whose model writes none, without its package, or that may not run code.
    """
    wanted = tuple(map(find, config.data.metric_names))
    otherwise = ""
    if config.model.task is None:  # of rows that are not there, or of no known layout, it is a guess
        from fedpeft.tasks import TASKS

        writing = " or ".join(name for name, each in TASKS.all().items() if each.continues)
        otherwise = f", or see whether data.source is there, and set model.task={writing}"
    if config.run.generate and not task.continues:
        raise ConfigError(
            f"run.generate = {config.run.generate} shows answers that a model writes, and that of task '{task.name}' "
            f"writes none; drop it{otherwise}."
        )
    able = ", ".join(name for name, metric in METRICS.all().items() if metric.judge is not None)
    for metric in wanted:
        given = f"data.metric = '{metric.name}'"
        if metric.judge is None:
            raise ConfigError(f"{given} judges no answers. Give some of {able}.")
        if not task.continues:
            raise ConfigError(f"{given} judges answers that a model writes; task '{task.name}' has none{otherwise}.")
        if metric.needs is not None and find_spec(metric.needs) is None:
            raise ConfigError(f"{given} needs the package {metric.needs}: pip install 'fedpeft[metrics]'")
        if metric.runs_code and not config.run.execute_code:
            raise ConfigError(
                f"{given} runs the Python code that the model writes on this machine, with limits of time and memory "
                "but without a sandbox: it can read and change files and use the network. Give run.execute_code=true "
                "where nothing can be lost, such as in a container."
            )
    return wanted
