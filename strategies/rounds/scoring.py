"""Test scores of a run's adapter, by the server's own rows: over all, by domain and by client."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.resident import Resident, resident
from fedpeft.strategies.rounds.records import Personal
from fedpeft.tasks.metrics import Scores
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
    home = resident(part.config)
    # they lie in memory that is shared, and that nobody may write to: what is kept of them must be a copy
    tensors = {name: torch.tensor(array) for name, array in {**shared, **part.own}.items()}
    home.adapted.load(tensors, home.adapted.scaling)
    batches = batches_of(home.test, part.config)[part.first : part.last]
    return score_batches(home.adapted.model, home.test, part.config, batches)


SCORE_PART = f"{__name__}:{score_part.__name__}"


def _here(_: str, jobs: Iterable[Part], shared: Mapping[str, NDArray[np.generic]]) -> Iterable[list[RowScores]]:
    return (score_part(job, shared) for job in jobs)


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
        self.is_over_after: Callable[[int], bool] = lambda server_round: False  # whether a round is the last after all

    def __call__(self, server_round: int, arrays: ArrayRecord) -> tuple[dict[str, float], dict[str, Any]] | None:
        """Return the test metrics, and those by domain and client; None where this round is not due."""
        every, last = self.config.run.evaluate_every, self.config.federation.rounds
        if server_round % every and server_round != last and not self.is_over_after(server_round):
            return None
        return self.score(to_tensors(arrays))

    def score(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the test metrics, and those by domain and client."""
        shared = arrays_of(tensors)
        if not self.personal_names:
            (scores,) = self._scores(self._parts(), shared)
            return scores.metrics(), self.details([scores])
        personal = self.personal() if self.personal is not None else {}
        initial = self.home.adapted.initial
        drawn = {name: initial[name] for name in self.personal_names}
        count, each = self._num_batches, personal.values() if personal else [drawn]  # read one by one
        models = (Part(self.config, 0, count, arrays_of(own)) for own in each)
        every = list(self._scores(models, shared, each=True))
        return mean_metrics([scores.metrics() for scores in every]), self.details(every, list(personal))

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
                parts["clients"] = {key: mean_and_worst(clients, key), "scores": clients}
        return parts


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    """Return tensors as arrays, which travel between processes without a copy."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}
