"""A run's events folded into what became of it, one event at a time, and how its scores are judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fedpeft.errors import RunDirectoryError
from fedpeft.formats import finite
from fedpeft.runs.directory import EVENTS_FILE, Event, read_events
from fedpeft.tasks.metrics import find, shown

ERRORS = ("aggregation_error", "aggregation_error_of_total")  # relative to the round's step, and to all learned


@dataclass
class ClientRecord:
    """One client over all rounds.

    Parameters
    ----------
    rounds : int
        In how many its update counted.
    faults : int
        In how many it did not answer well.
    num_examples, loss, seconds
        Of its latest good round.
    """

    rounds: int = 0
    faults: int = 0
    num_examples: int | None = None
    loss: float | None = None
    seconds: float | None = None


@dataclass
class History:
    """What happened in a run so far.

    Scores of single clients are kept of the first and the latest evaluation only, and clients' reports of the latest
    round only, so that long runs with many clients stay small.
    """

    rounds: dict[int, Event] = field(default_factory=dict)
    evaluations: dict[int, Event] = field(default_factory=dict)
    clients: dict[str, ClientRecord] = field(default_factory=dict)
    client_scores: list[dict[str, dict[str, float]]] = field(default_factory=list)
    faults: list[Event] = field(default_factory=list)
    samples: Event | None = None
    privacy: Event | None = None
    end: Event | None = None

    @classmethod
    def from_events(cls, events: Iterable[object]) -> Self:
        """Fold events; whatever is not one of ours is passed over."""
        history = cls()
        for event in events:
            history.add(event)
        return history

    @classmethod
    def read(cls, run: Path) -> Self:
        """Fold a run directory's metrics.jsonl.

        Raises
        ------
        RunDirectoryError
            The file is not text.
        OSError
            The file cannot be read.
        """
        try:
            return cls.from_events(read_events(run))
        except UnicodeDecodeError:
            raise RunDirectoryError(f"'{run / EVENTS_FILE}' is not text; restore it, or remove the run.") from None

    def add(self, event: object) -> None:
        """Fold one more event in."""
        if not isinstance(event, dict) or not isinstance(event.get("round"), int):
            return
        number, kind = event["round"], event.get("event")
        if kind == "round":
            self.rounds[number] = event
        elif kind == "client":
            record = self.client(event.get("id"))
            record.rounds += 1
            rows = finite(event.get("num_examples"))
            record.num_examples = None if rows is None else int(rows)
            record.loss, record.seconds = event.get("loss"), finite(event.get("seconds"))
        elif kind == "fault":
            self.faults.append(event)
            self.client(event.get("client")).faults += 1
        elif kind == "evaluate" and event.get("split", "test") == "test":
            self._add_evaluation(number, event)
        elif kind == "samples":
            self.samples = event
        elif kind == "privacy":
            self.privacy = event
        elif kind == "end":
            self.end = event

    def _add_evaluation(self, number: int, event: Event) -> None:
        clients = event.get("clients")
        if isinstance(clients, Mapping):
            scores = clients.get("scores")
            if isinstance(scores, Mapping):
                self.client_scores = [*self.client_scores[:1], dict(scores)]
            event = event | {"clients": {key: value for key, value in clients.items() if key != "scores"}}
        self.evaluations[number] = event

    def client(self, name: object) -> ClientRecord:
        """Return the record of a client, made if it is new."""
        return self.clients.setdefault(str(name), ClientRecord())

    @property
    def done(self) -> int:
        """Rounds done."""
        return max(self.rounds, default=0)

    @property
    def state(self) -> str:
        """``completed``, ``interrupted``, ``stopped``, or ``running`` where no end is on record."""
        if self.end is None:
            return "running"
        reason = "completed" if self.is_early else self.end.get("reason")
        return reason if reason in ("completed", "interrupted") else "stopped"

    @property
    def is_early(self) -> bool:
        """Whether the run ended before its last round because its configuration asked for that."""
        return self.end is not None and self.end.get("early") is True

    @property
    def metric(self) -> str | None:
        """The score by which the run is judged; None before the first evaluation."""
        return next(iter(self.metrics), None)

    @property
    def metrics(self) -> list[str]:
        """All scores on record, in the order in which they are shown."""
        return shown({name for event in self.evaluations.values() for name in event})

    def ends_of(self, metric: str) -> tuple[Event, Event] | None:
        """Return the earliest and the latest evaluation with a metric, which not each has; None where none has."""
        having = [at for at in sorted(self.evaluations) if self.evaluations[at].get(metric) is not None]
        return (self.evaluations[having[0]], self.evaluations[having[-1]]) if having else None

    @property
    def first(self) -> Event | None:
        """The earliest evaluation."""
        return self.evaluations[min(self.evaluations)] if self.evaluations else None

    @property
    def last(self) -> Event | None:
        """The latest evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    @property
    def is_counted(self) -> bool:
        """Whether bytes and times are on record: where clients' privacy hides who took part, they are not."""
        return any(event.get("bytes_up") is not None for event in self.rounds.values())

    @property
    def bytes_up(self) -> int:
        """Bytes sent by clients in all rounds."""
        return self._sum("bytes_up")

    @property
    def bytes_down(self) -> int:
        """Bytes sent to clients in all rounds."""
        return self._sum("bytes_down")

    @property
    def seconds(self) -> float:
        """Seconds that the rounds took, evaluation not counted."""
        return sum(finite(event.get("seconds")) or 0.0 for event in self.rounds.values())

    @property
    def is_private(self) -> bool:
        """Whether rounds, or an end, speak of privacy."""
        return self.privacy is not None or any("epsilon_max" in event for event in self.rounds.values())

    @property
    def epsilon(self) -> float | None:
        """What was spent on the client that spent most: as stated at the end, or what it is not above so far."""
        latest = self.rounds.get(self.done, {}) if self.privacy is None else self.privacy
        return finite(latest.get("epsilon_max"))

    def _sum(self, key: str) -> int:
        return sum(int(finite(event.get(key)) or 0) for event in self.rounds.values())

    def bytes_until(self, number: int) -> int:
        """Return the bytes moved up to the end of a round, in both directions."""
        done = (event for at, event in self.rounds.items() if at <= number)
        return sum(int(finite(event.get(key)) or 0) for event in done for key in ("bytes_up", "bytes_down"))


def domain_scores(evaluation: Event | None, metric: str) -> dict[str, float]:
    """Return one metric of each domain of an evaluation; empty where there are no domains."""
    domains = (evaluation or {}).get("domains")
    if not isinstance(domains, Mapping):
        return {}
    values = {name: finite(scores.get(metric)) for name, scores in domains.items() if isinstance(scores, Mapping)}
    return {str(name): value for name, value in values.items() if value is not None}


def worst(scores: Mapping[str, float], metric: str) -> str:
    """Return the name of the worst score; of equal ones the first by name."""
    sign = 1.0 if find(metric).better == "higher" else -1.0
    return min(sorted(scores), key=lambda name: sign * scores[name])
