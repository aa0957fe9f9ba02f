"""Answers to a few test rows, by the model that a run began with and by the one that it ended with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedpeft.adapters.state import AdapterState
from fedpeft.data.tokens import load_tokenizer
from fedpeft.generation import drawn_rows, words_of
from fedpeft.privacy.overlap import in_the_clear
from fedpeft.runs import Event
from fedpeft.strategies.rounds.ending import EarlyEndError
from fedpeft.strategies.rounds.records import Journal
from fedpeft.strategies.rounds.report import RoundReport
from fedpeft.strategies.rounds.scoring import Scoring
from fedpeft.strategies.rounds.watchers import Watcher


class Samples(Watcher):
    """Records, at the end of a run that came to its end, what the model answered before it and answers now.

    Parameters
    ----------
    scoring : Scoring
        Answers.
    journal : Journal
        Where the event goes.
    initial : mapping of str to Tensor
        The adapter that the run began with.
    """

    def __init__(self, scoring: Scoring, journal: Journal, initial: Mapping[str, Tensor]) -> None:
        self.journal, self.scoring, self.home = journal, scoring, scoring.home
        self.initial, self.last = initial, initial
        self.rounds = 0

    def round_done(self, report: RoundReport, state: AdapterState) -> None:
        """Remember the adapter."""
        self.rounds, self.last = report.server_round, state.to_tensors()

    def resumed(self, server_round: int, state: AdapterState, memory: Mapping[str, Any]) -> None:
        """Remember the adapter."""
        self.rounds, self.last = server_round, state.to_tensors()

    def ended(self, error: BaseException | None) -> None:
        """Record the answers, or why there are none."""
        if error is not None and not isinstance(error, EarlyEndError):
            return
        event: Event = {"event": "samples", "round": self.rounds}
        if why := self._withheld():
            self.journal.emit(event | {"samples": [], "withheld": why})
            return
        test = self.home.test
        rows = drawn_rows(self.scoring.config, test, self.scoring.config.run.generate)
        before = self.scoring.texts(self.initial, rows, personal=False)
        after = self.scoring.texts(self.last, rows)
        tokenizer, _ = load_tokenizer(self.home.config, self.home.folder)
        # with the marks of turns, as the model reads them: without, they would run into each other
        prompts = [words_of(tokenizer, prompt) for prompt in test.prompts(rows)]
        of_rows = {"domain": test.domains, "client": test.clients}
        samples = [
            {
                **{name: values[row] for name, values in of_rows.items() if values is not None},
                "prompt": prompt,
                "reference": reference,
                "before": one,
                "after": other,
            }
            for row, prompt, reference, one, other in zip(
                rows.tolist(), prompts, test.references(rows), before, after, strict=True
            )
        ]
        self.journal.emit(event | {"samples": samples})

    def _withheld(self) -> str:
        """Say why a private run shows no answers; empty where it may."""
        if not self.scoring.config.privacy.is_private:
            return ""
        clear = in_the_clear(self.home)
        if clear.in_scores:
            return (
                "test rows are of the clients' own source, whose texts this run protects; give data.test with rows "
                "that may be public"
            )
        if self.scoring.personal_names:
            return "answers would be those of the clients' own models, which no noise covers"
        return ""


def samples(scoring: Scoring, journal: Journal, initial: Mapping[str, Tensor]) -> list[Watcher]:
    """Return who records samples, as a run asks for them by ``run.generate``; nobody where it asks for none."""
    return [Samples(scoring, journal, initial)] if scoring.config.run.generate else []
