from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedpeft.cli import main
from fedpeft.runs import checks
from fedpeft.runs.checks import Finding, State


def doctor(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "doctor", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_doctor_answers_machines_in_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor(monkeypatch, "--json") in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert {"name", "state", "seen", "advice"} == set(found[0])
    assert {each["state"] for each in found} <= {"ok", "slow", "broken"}


@pytest.mark.parametrize(("state", "code"), [(State.OK, 0), (State.SLOW, 0), (State.BROKEN, 1)])
def test_the_doctor_exits_with_1_where_a_run_will_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: State, code: int
) -> None:
    monkeypatch.setattr(checks, "examine", lambda: [Finding("disk", state, "full", "make room")])
    assert doctor(monkeypatch) == code
    assert "make room" in capsys.readouterr().out


def test_a_ray_that_does_not_start_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(checks, "examine", list)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert doctor(monkeypatch, "--ray") == 1
    assert "cannot be connected to" in " ".join(capsys.readouterr().out.split())
