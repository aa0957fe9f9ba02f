from __future__ import annotations

from typing import Any

from fedpeft.report.examined import findings_table, worst
from fedpeft.runs.checks import Finding, State
from tests.report.printing import joined, printed


def facts(*states: State) -> list[dict[str, Any]]:
    return [dict(Finding(f"thing {state}", state, "7 [red]of 8", "turn it").to_dict()) for state in states]


def test_each_finding_is_shown_with_what_to_do() -> None:
    text = joined(printed(findings_table(facts(State.OK, State.SLOW))))
    for expected in ("thing ok", "thing slow", "7 [red]of 8", "turn it", "slow or short; runs will work"):
        assert expected in text


def test_the_worst_finding_decides() -> None:
    assert worst([]) == worst(facts(State.OK)) == "ok"
    assert worst(facts(State.SLOW, State.BROKEN, State.OK)) == "broken"
    assert "runs will fail" in printed(findings_table(facts(State.BROKEN)))
