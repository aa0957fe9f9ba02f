"""Test scores of a run's adapter, by the server's own rows: over all, by domain and by client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.resident import Resident
from fedpeft.strategies.rounds.records import Personal
from fedpeft.tasks.metrics import Scores
from fedpeft.training.evaluation import client_metrics, mean_and_worst, mean_metrics, score
from fedpeft.wire import to_tensors


class Scoring:
    """Scores an adapter on the test split, in the rounds in which that is due.

    Where tensors stay with each client (`personal_names`), the score is the mean over the clients' own models;
    `personal` gives these tensors, where the server may see them.
    """

    def __init__(
        self, config: RunConfig, home: Resident, personal_names: Sequence[str], personal: Personal | None
    ) -> None:
        self.config, self.home, self.personal_names, self.personal = config, home, personal_names, personal

    def __call__(self, server_round: int, arrays: ArrayRecord) -> tuple[dict[str, float], dict[str, Any]] | None:
        """Return the test metrics, and those by domain and client; None where this round is not due."""
        every, last = self.config.run.evaluate_every, self.config.federation.rounds
        if server_round % every and server_round != last:
            return None
        return self.score(to_tensors(arrays))

    def score(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the test metrics, and those by domain and client."""
        adapted, test = self.home.adapted, self.home.test
        if not self.personal_names:
            adapted.load(tensors, adapted.scaling)
            scores = score(adapted.model, test, self.config)
            return scores.metrics(), self.details([scores])
        personal = self.personal() if self.personal is not None else {}
        drawn = {name: adapted.initial[name] for name in self.personal_names}
        every: list[Scores] = []
        for tensors_of_client in personal.values() if personal else [drawn]:  # read one by one
            adapted.load({**tensors, **tensors_of_client}, adapted.scaling)
            every.append(score(adapted.model, test, self.config))
        return mean_metrics([scores.metrics() for scores in every]), self.details(every, list(personal))

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
