"""What the answers that a model writes to test rows are worth, by the metrics of ``data.metric``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import DataError
from fedpeft.generation.choosing import choose, options_of
from fedpeft.generation.decoding import Limits, generate
from fedpeft.seeds import generator
from fedpeft.tasks.metrics import Scores, asked

MOST_PARTS, PART_ROWS = 64, 16  # of the rows that are answered: how many parts at most, and rows of one at least


@dataclass(frozen=True)
class Answers:
    """What a model answers to some rows of a split.

    Parameters
    ----------
    rows : array of int64, shape (m,)
        Which rows.
    texts : tuple of str
        The answers; empty where they were only judged.
    marks : mapping of str to array of float64, shape (m, k)
        By metric, what they are worth.
    """

    rows: NDArray[np.int64]
    texts: tuple[str, ...] = ()
    marks: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


def drawn_rows(config: RunConfig, split: EncodedSplit, most: int | None) -> NDArray[np.int64]:
    """Return which test rows are answered, drawn once for a run; of fewer, the first of the same draw.

    Raises
    ------
    DataError
        No row has an answer that could be held against the model's, as rows of raw text have none; or answers are
        to be chosen among the rows' own, and these are no options.
    """
    able = [row for row, prompt in enumerate(split.prompts(range(len(split)))) if len(prompt)]
    if not able:
        raise DataError(
            "the test rows are raw text and hold no answers, which data.metric and run.generate need; drop these "
            "settings, or give data.test with prompts and completions."
        )
    if any(metric.chosen for metric in asked(config, tasks.of(config))):
        options_of(split)
    rows = np.asarray(able, dtype=np.int64)
    if most is None or most >= len(rows):
        return rows
    return np.sort(rows[generator(config.run.seed, "answers").permutation(len(rows))[:most]])


def parts_of(split: EncodedSplit, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Divide rows into parts of like lengths, the longest first, by nothing but the rows themselves."""
    lengths = np.asarray([len(prompt) for prompt in split.prompts(rows)])
    order = rows[np.argsort(-lengths, kind="stable")]
    size = max(PART_ROWS, -(-len(rows) // MOST_PARTS))
    return [order[start : start + size] for start in range(0, len(rows), size)]


def answer(
    model: nn.Module, tokenizer: Any, split: EncodedSplit, rows: NDArray[np.int64], config: RunConfig
) -> list[str]:
    """Return a model's answers to some rows of a split.

    Parameters
    ----------
    model : torch.nn.Module
        See `generate`, as for `tokenizer`.
    tokenizer : transformers.PreTrainedTokenizerBase
        The base's.
    split : EncodedSplit
        Holds the rows.
    rows : array of int64, shape (m,)
        Which.
    config : RunConfig
        Gives the length and the precision.
    """
    limits = Limits(config.data.max_new_tokens)
    return generate(model, tokenizer, split.prompts(rows), limits, config.train.precision)


def judge(model: nn.Module, tokenizer: Any, split: EncodedSplit, rows: NDArray[np.int64], config: RunConfig) -> Answers:
    """Hold a model's answers against the references of their rows, by the metrics that the run asks for.

    Parameters are those of `answer`.
    """
    metrics, references = asked(config, tasks.of(config)), split.references(rows)
    texts: dict[bool, list[str]] = {}  # by whether they are chosen
    for chosen in {each.chosen for each in metrics}:
        texts[chosen] = choose(model, split, rows, config) if chosen else answer(model, tokenizer, split, rows, config)
    marks = {each.name: each.judge(texts[each.chosen], references) for each in metrics if each.judge is not None}
    return Answers(rows, marks=marks)


def with_answers(scores: Scores, parts: Iterable[Answers]) -> Scores:
    """Return a model's scores with what its answers are worth."""
    whole: dict[str, NDArray[np.float64]] = {}
    for part in parts:
        for name, marks in part.marks.items():
            held = whole.setdefault(name, np.full((len(scores.loss), marks.shape[1]), np.nan))
            held[part.rows] = marks
    return scores.judged(whole) if whole else scores
