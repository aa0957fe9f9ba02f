"""What lies in a private run's directory, and what must not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedpeft.clients.app as clients
from fedpeft.config import RunConfig
from fedpeft.runs import Event, read_events
from fedpeft.simulations.grids.base import place_of
from fedpeft.simulations.simulate import simulate

Make = Callable[..., RunConfig]
SECRET = 'a row of secrets\n  File "/etc/fedpeft/rows.py", line 1, in secrets'


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client's training quotes a row."""
    train = clients.train_locally

    def fails(*given: Any, **settings: Any) -> Any:
        if given[4].client_id == "site-1":
            raise ValueError(SECRET)
        return train(*given, **settings)

    monkeypatch.setattr(clients, "train_locally", fails)


def whole(run: Path) -> str:
    """Return all that is written, names of files included."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return "\n".join(f"{path.relative_to(run)}\n{path.read_bytes().decode(errors='replace')}" for path in files)


def test_at_client_level_nothing_of_a_single_client_is_written(
    failing: None, text_config: Make, tmp_path: Path
) -> None:
    heard: list[Event] = []
    settings = {"privacy__level": "client", "privacy__noise_multiplier": 1.0, "strategy__name": "fedit"}
    run = simulate(text_config(**settings), tmp_path / "run", listener=heard.append).path
    assert not (run / "faults").exists()
    written = whole(run)
    assert "a row of secrets" not in written
    assert "ValueError" not in written
    (warned, *more) = [str(event["message"]) for event in heard if event["event"] == "warning"]
    assert "an answer that does not count: raised twice: ValueError" in warned
    assert not any("site-" in message or "secrets" in message for message in [warned, *more])
    # clients are named in the statement, all of them and all alike, and nowhere else
    facts = json.loads((run / "privacy.json").read_text())
    assert len({json.dumps(found) for found in facts["clients"].values()}) == 1
    assert "site-" not in (run / "metrics.jsonl").read_text() + (run / "ledger.jsonl").read_text()
    rounds = [event for event in read_events(run) if event["event"] == "round"]
    assert {event["exhausted"] for event in rounds} == {None}


def test_at_record_level_a_traceback_says_where_and_quotes_no_row(
    failing: None, text_config: Make, tmp_path: Path
) -> None:
    settings = {"privacy__level": "record", "privacy__noise_multiplier": 1.0, "federation__rounds": 1}
    run = simulate(text_config(**settings), tmp_path / "run").path
    told = (run / "faults" / "round-0001-client-site-1.txt").read_text()
    assert "a row of secrets" not in whole(run)
    assert "/etc/fedpeft" not in told
    assert told.startswith("ValueError\n")
    assert "clients/app.py:" in told
    assert "privacy.release_metrics=true keeps it" in told
    open_run = simulate(text_config(privacy__release_metrics=True, **settings), tmp_path / "open").path
    assert SECRET in (open_run / "faults" / "round-0001-client-site-1.txt").read_text()


def test_a_place_names_each_error_of_a_chain_and_quotes_none() -> None:
    def inner() -> None:
        raise KeyError("secret")

    try:
        try:
            inner()
        except KeyError as error:
            raise RuntimeError("another secret") from error
    except RuntimeError as error:
        told = place_of(error)
    lines = told.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["KeyError", "RuntimeError"]
    assert any(line.endswith("in inner") for line in lines)
    assert "secret" not in told
