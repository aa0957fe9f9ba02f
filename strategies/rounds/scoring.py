"""Test scores of a run's adapter, by the server's own rows: over all, by domain and by client."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.data.tokens import load_tokenizer
from fedpeft.generation import Answers, answer, drawn_rows, judge, parts_of, with_answers
from fedpeft.resident import Resident, resident
from fedpeft.strategies.rounds.records import Personal
from fedpeft.tasks.metrics import Scores, asked
from fedpeft.training.evaluation import (
    RowScores,
    batches_of,
    client_metrics,
    mean_and_worst,
    mean_metrics,
    score_batches,
    together,
)
from fedpeft.wire import to_tensors

# how a function of a module is called with each job: at workers, or here if there are none
Map = Callable[..., Iterable[Any]]
MOST_PARTS = 64  # of the test rows, for which each a worker is asked once


@dataclass(frozen=True)
class Part:
    """What a worker is to score.

    Parameters
    ----------
    config : RunConfig
        Of the run.
    first, last : int
        Of the test split's batches, see `fedpeft.training.evaluation.batches_of`: from `first` to before `last`.
    own : mapping of str to array
        Tensors that take the place of the shared ones: a client's.
    """

    config: RunConfig
    first: int
    last: int
    own: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


def score_part(part: Part, shared: Mapping[str, NDArray[np.generic]]) -> list[RowScores]:
    """Score an adapter on a part of the test rows, with this process's model and rows.

    Parameters
    ----------
    part : Part
        Which rows, and what in the adapter is not shared.
    shared : mapping of str to array
        The adapter, and changes of the base.
    """
    home = _loaded(part.config, {**shared, **part.own})
    batches = batches_of(home.test, part.config)[part.first : part.last]
    return score_batches(home.adapted.model, home.test, part.config, batches)


@dataclass(frozen=True)
class Questions:
    """What a worker is to answer.

    Parameters
    ----------
    config : RunConfig
        Of the run.
    rows : array of int64, shape (m,)
        Of the test split.
    own : mapping of str to array
        Tensors that take the place of the shared ones: a client's.
    keeps_texts : bool
        Whether the answers themselves are wanted, rather than what they are worth.
    """

    config: RunConfig
    rows: NDArray[np.int64]
    own: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    keeps_texts: bool = False


def answer_part(part: Questions, shared: Mapping[str, NDArray[np.generic]]) -> Answers:
    """Answer some test rows, with this process's model and rows, and judge the answers.

    Parameters
    ----------
    part : Questions
        Which rows, and what in the adapter is not shared.
    shared : mapping of str to array
        The adapter, and changes of the base.
    """
    home = _loaded(part.config, {**shared, **part.own})
    asked_of = home.adapted.model, home.once(_tokenizer), home.test, part.rows, part.config
    return Answers(part.rows, tuple(answer(*asked_of))) if part.keeps_texts else judge(*asked_of)


def _tokenizer(home: Resident) -> Any:
    return load_tokenizer(home.config, home.folder)[0]


def _loaded(config: RunConfig, arrays: Mapping[str, NDArray[np.generic]]) -> Resident:
    """Return this process's model and rows, with an adapter in place."""
    home = resident(config)
    # they lie in memory that is shared, and that nobody may write to: what is kept of them must be a copy
    home.adapted.load({name: torch.tensor(array) for name, array in arrays.items()}, home.adapted.scaling)
    return home


SCORE_PART = f"{__name__}:{score_part.__name__}"
ANSWER_PART = f"{__name__}:{answer_part.__name__}"


def _here(function: str, jobs: Iterable[Any], shared: Mapping[str, NDArray[np.generic]]) -> Iterable[Any]:
    call = answer_part if function == ANSWER_PART else score_part
    return (call(job, shared) for job in jobs)


class Scoring:
    """Scores an adapter on the test split, in the rounds in which that is due.

    Where tensors stay with each client (`personal_names`), the score is the mean over the clients' own models;
    `personal` gives these tensors, where the server may see them.

    The rows are divided into parts that depend on nothing but their number and the batch size, so that metrics are the
    same however many workers share the parts. `map` is how workers are called; this process does all if not given.
    """

    def __init__(
        self,
        config: RunConfig,
        home: Resident,
        personal_names: Sequence[str],
        personal: Personal | None,
        map: Map | None = None,
    ) -> None:
        self.config, self.home, self.personal_names, self.personal = config, home, personal_names, personal
        self.map: Map = map or _here
        # whether a round is the last after all: by what was moved, and by the scores that it came to
        self.is_over_after: Callable[[int], bool] = lambda server_round: False
        self.is_over_with: Callable[[int, Mapping[str, float]], bool] = lambda server_round, metrics: False

    def __call__(self, server_round: int, arrays: ArrayRecord) -> tuple[dict[str, float], dict[str, Any]] | None:
        """Return the test metrics, and those by domain and client; None where this round is not due."""
        every, over = self.config.run.evaluate_every, self._is_last(server_round)
        if server_round % every and not over:
            return None
        judges = bool(asked(self.config, tasks.of(self.config)))
        answers = partial(self._answers, server_round) if judges else None
        return self.score(to_tensors(arrays), answers=answers)

    def _is_last(self, server_round: int) -> bool:
        return server_round == self.config.federation.rounds or self.is_over_after(server_round)

    def _answers(self, server_round: int, metrics: Mapping[str, float]) -> bool:
        """Tell whether the model is to answer test rows after a round, for metrics that judge what it writes."""
        every = self.config.run.generate_every
        due = server_round == 0 or (every is not None and server_round % every == 0)
        return due or self._is_last(server_round) or self.is_over_with(server_round, metrics)

    def score(
        self, tensors: Mapping[str, Tensor], *, answers: Callable[[Mapping[str, float]], bool] | None = None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the test metrics, and those by domain and client.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            The adapter, and changes of the base.
        answers : callable, optional
            Tells of these metrics whether the model is to answer rows too, whose metrics are then among them.
        """
        shared = arrays_of(tensors)
        personal = self.personal() if self.personal_names and self.personal is not None else {}
        every = self._models(shared, personal)
        if answers is not None and answers(mean_metrics([scores.metrics() for scores in every])):
            every = self._judged(every, shared, personal)
        return mean_metrics([scores.metrics() for scores in every]), self.details(every, list(personal))

    def _models(
        self, shared: Mapping[str, NDArray[np.generic]], personal: Mapping[str, Mapping[str, Tensor]]
    ) -> list[Scores]:
        """Return the scores of the one model, or of each client's own."""
        if not self.personal_names:
            return list(self._scores(self._parts(), shared))
        models = (Part(self.config, 0, self._num_batches, arrays_of(own)) for own in self._owned(personal))
        return list(self._scores(models, shared, each=True))

    def _judged(
        self,
        every: Sequence[Scores],
        shared: Mapping[str, NDArray[np.generic]],
        personal: Mapping[str, Mapping[str, Tensor]],
    ) -> list[Scores]:
        """Return models' scores with what their answers are worth."""
        rows = drawn_rows(self.config, self.home.test, self.config.run.generate_rows)
        if not self.personal_names:
            questions = (Questions(self.config, part) for part in parts_of(self.home.test, rows))
            return [with_answers(every[0], self.map(ANSWER_PART, questions, shared))]
        questions = (Questions(self.config, rows, arrays_of(own)) for own in self._owned(personal))
        found = self.map(ANSWER_PART, questions, shared)
        return [with_answers(scores, [part]) for scores, part in zip(every, found, strict=True)]

    def _owned(self, personal: Mapping[str, Mapping[str, Tensor]]) -> Iterable[Mapping[str, Tensor]]:
        """Return what each model has of its own, read one by one; as it was drawn, where no client has any yet."""
        return personal.values() if personal else [self._drawn()]

    def _drawn(self) -> dict[str, Tensor]:
        initial = self.home.adapted.initial
        return {name: initial[name] for name in self.personal_names}

    def texts(self, tensors: Mapping[str, Tensor], rows: NDArray[np.int64], *, personal: bool = True) -> list[str]:
        """Return a model's answers to some test rows; where models are the clients' own, each row's by its client's.

        A row of no client that has a model is answered by that of the first client. Without `personal`, what stays
        with clients is as it was drawn.
        """
        owned = self.personal() if personal and self.personal is not None and self.personal_names else {}
        parts: dict[str, list[int]] = {}
        for row in rows.tolist():
            of_row = "" if self.home.test.clients is None else str(self.home.test.clients[row])
            parts.setdefault(of_row if of_row in owned else min(owned, default=""), []).append(row)
        drawn = self._drawn()
        questions = (
            Questions(self.config, np.asarray(part), arrays_of(owned.get(client, drawn)), keeps_texts=True)
            for client, part in parts.items()
        )
        found = {
            row: text
            for part in self.map(ANSWER_PART, questions, arrays_of(tensors))
            for row, text in zip(part.rows.tolist(), part.texts, strict=True)
        }
        return [found[row] for row in rows.tolist()]

    @property
    def _num_batches(self) -> int:
        return len(batches_of(self.home.test, self.config))

    def _parts(self) -> Iterator[Part]:
        """Divide the batches, the longest rows first, since they take longest."""
        batches = self._num_batches
        size = math.ceil(batches / MOST_PARTS) or 1
        for first in reversed(range(0, batches, size)):
            yield Part(self.config, first, min(first + size, batches))

    def _scores(
        self, parts: Iterable[Part], shared: Mapping[str, NDArray[np.generic]], *, each: bool = False
    ) -> Iterator[Scores]:
        """Yield the scores of one model, of which these are the parts, or of `each` part's own model."""
        found = self.map(SCORE_PART, parts, shared)
        for rows in found if each else [chain.from_iterable(found)]:
            yield together(list(rows), len(self.home.test), self.config)

    def details(self, every: Iterable[Scores], owners: Sequence[str] = ()) -> dict[str, Any]:
        """Break test scores down by domain, and by client if asked: by its own model, where each has an owner."""
        models, test = list(every), self.home.test
        parts: dict[str, Any] = {}
        if test.domains is not None:
            by_domain = [scores.by_group(test.domains) for scores in models]
            parts["domains"] = {name: mean_metrics([groups[name] for groups in by_domain]) for name in by_domain[0]}
        if self.config.run.evaluate_clients:
            rows = (test, self.home.data.train, self.home.partition)
            clients: dict[str, dict[str, float]] = {}
            for name, scores in zip(owners, models, strict=False):
                clients |= client_metrics(scores, *rows, clients={name})
            if not owners:  # one model for all
                clients = client_metrics(models[0], *rows)
            key = tasks.of(self.config).main_metric
            if clients:  # of no client are there test rows, else
                judged = [measure.name for measure in models[0].measures if measure.judge is not None]
                shown = [name for name in judged if all(name in scores for scores in clients.values())]
                summary = {name: mean_and_worst(clients, name) for name in (key, *shown)}
                parts["clients"] = {**summary, "scores": clients}
        return parts


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    """Return tensors as arrays, which travel between processes without a copy."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}
