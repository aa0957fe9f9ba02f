"""What is kept of a run: its events, and how it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedpeft.adapters.state import AdapterState
from fedpeft.errors import TooFewClientsError
from fedpeft.runs import Event
from fedpeft.strategies import FedIt
from fedpeft.strategies.rounds.records import Journal, Records
from fedpeft.strategies.rounds.report import Fault, RoundReport

STATE = AdapterState({}, {"head.weight": torch.zeros(2)})


class Folder:
    """Takes the place of a run directory."""

    path = Path("nowhere")

    def __init__(self) -> None:
        self.events: list[Event] = []

    def append(self, event: Event) -> None:
        self.events.append(event)

    def take_problems(self) -> list[str]:
        return []


def records(withholds: bool = False) -> tuple[Records, Folder, list[Event]]:
    folder, heard = Folder(), list[Event]()
    journal = Journal(folder, heard.append)  # type: ignore[arg-type]
    return Records(journal, FedIt(), None, lambda client: f"row 7 of {client}", withholds), folder, heard


def failing(server_round: int = 1) -> RoundReport:
    return RoundReport(server_round, faults=[Fault("3", "raised twice: ValueError", raised=True)])


def test_why_a_client_raised_is_heard_and_not_recorded() -> None:
    keeper, folder, heard = records()
    keeper.round_done(failing(), STATE)
    assert folder.events[0] == {"event": "fault", "round": 1, "client": "3", "reason": "raised twice: ValueError"}
    assert heard[0] == folder.events[0] | {"why": "row 7 of 3"}


def test_who_failed_is_on_no_record_where_it_is_withheld_who_took_part() -> None:
    keeper, folder, heard = records(withholds=True)
    keeper.round_done(failing(), STATE)
    assert [event["event"] for event in folder.events] == ["round"]
    assert heard[0]["event"] == "warning"
    assert "client" not in heard[0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "completed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(1), "stopped"),
        (ValueError("of rows"), "ValueError"),
        (TooFewClientsError("round 2: too few"), "round 2: too few"),
    ],
)
def test_the_end_says_what_ended_the_run(error: BaseException | None, reason: str) -> None:
    keeper, folder, _ = records()
    keeper.round_done(RoundReport(1), STATE)
    if error is not None:
        keeper.round_broken(failing(2), error)
    keeper.ended(error)
    assert folder.events[-1] == {"event": "end", "round": 1, "reason": reason}
    assert keeper.outcome.reason == reason
    stopped = keeper.outcome.error
    assert str(stopped or "") == ("round 2: too few row 7 of 3" if isinstance(error, TooFewClientsError) else "")
