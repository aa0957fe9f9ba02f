from __future__ import annotations

from typing import Any

from fedpeft.report.audited import audit_view
from tests.report.printing import joined, printed


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "run": "runs/mine",
        "level": "record",
        "claimed_epsilon": 2.99912,
        "delta": 1e-5,
        "canaries": 200,
        "included": 98,
        "guesses": 100,
        "correct": 61,
        "confidence": 0.95,
        "epsilon_lower_bound": 0.02999,
        "most": 3.4,
        "violated": False,
        "meaning": "The guesses do not contradict the claim.",
        **changes,
    }


def test_the_claim_stands_beside_the_bound() -> None:
    text = joined(printed(audit_view(facts())))
    assert "claimed epsilon 3.000 for each row" in text
    assert "200, of which 98 were trained on" in text
    assert "100, of which 61 were right" in text
    assert "epsilon is at least 0.029 at 95% confidence (3.400 if every guess were right)" in text
    assert "do not contradict" in text


def test_no_claim_says_why() -> None:
    assert "claimed epsilon none (privacy.level = none)" in joined(
        printed(audit_view(facts(claimed_epsilon=None, level="none")))
    )
    assert "claimed epsilon none (see privacy.json)" in joined(printed(audit_view(facts(claimed_epsilon=None))))
