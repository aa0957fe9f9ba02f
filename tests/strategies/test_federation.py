"""One run from the server's side: what becomes of an interrupt, whenever it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.runs import Event, read_events
from fedpeft.simulations.simulate import simulate
from tests.conftest import RunConfigMaker


def test_an_interrupt_in_a_round_is_how_the_run_ended(text_config: RunConfigMaker, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event["event"] == "client":
            raise KeyboardInterrupt

    outcome = simulate(text_config(), tmp_path / "run", listener=interrupt)
    assert outcome.reason == "interrupted"
    assert read_events(outcome.path)[-1]["reason"] == "interrupted"


def test_an_interrupt_while_the_end_is_written_is_not_taken_for_a_run_that_is_complete(
    text_config: RunConfigMaker, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event["event"] == "end":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(text_config(), tmp_path / "run", listener=interrupt)
