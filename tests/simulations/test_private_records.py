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
from fedpeft.simulations.simulate import resume, simulate

Make = Callable[..., RunConfig]
SITES = {"site-0", "site-1", "site-2"}
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


def stop_after(server_round: int) -> Callable[[Event], None]:
    """Interrupt a run as soon as a round is on record."""

    def listener(event: Event) -> None:
        if event["event"] == "round" and event["round"] == server_round:
            raise KeyboardInterrupt

    return listener


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


@pytest.fixture
def took_part(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who trains, in the order in which they do."""
    train, names = clients.train_locally, list[str]()

    def noted(*given: Any, **settings: Any) -> Any:
        names.append(given[4].client_id)
        return train(*given, **settings)

    monkeypatch.setattr(clients, "train_locally", noted)
    return names


@pytest.mark.parametrize(
    ("strategy", "adapter"), [("fedit", "lora"), ("fedit", "ffa-lora"), ("rolora", "lora"), ("fedsvd", "lora")]
)
def test_at_client_level_no_file_of_a_run_tells_who_took_part(
    strategy: str, adapter: str, took_part: list[str], text_config: Make, tmp_path: Path
) -> None:
    settings = {"privacy__level": "client", "privacy__noise_multiplier": 1.0, "federation__rounds": 4}
    some = {"federation__fraction": 0.3, "strategy__name": strategy, "adapter__kind": adapter}
    run = simulate(text_config(**settings, **some), tmp_path / "run", listener=stop_after(3)).path
    resume(run)
    assert 0 < len(set(took_part)) < len(SITES), "not a cohort of which anything could be told"
    assert not (run / "clients").exists()
    for path in run.rglob("*"):
        named = {site for site in SITES if site in path.name or (path.is_file() and site.encode() in path.read_bytes())}
        assert named in (set(), SITES), path


def test_at_client_level_what_is_personal_is_said_to_tell_who_took_part(text_config: Make, tmp_path: Path) -> None:
    settings = {"privacy__level": "client", "privacy__noise_multiplier": 1.0, "privacy__rng": "secure"}
    run = simulate(text_config(**settings, federation__rounds=1, strategy__name="fedsa-lora"), tmp_path / "run").path
    facts = json.loads((run / "privacy.json").read_text())
    assert not facts["guarantee"]
    assert "who has any has taken part. Of this run's directory that is clients/, checkpoints/" in facts["statement"]


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
