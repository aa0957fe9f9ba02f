"""Personal models of a run, scored side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft import rescoring
from fedpeft.config import RunConfig
from fedpeft.rescoring import rescore
from fedpeft.simulations.simulate import simulate

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt-tuning"])  # layers of the others are scored one by one
def test_personal_models_scored_side_by_side_have_the_scores_that_each_has_alone(
    text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    strategy = "local" if kind == "prompt-tuning" else "fedit"  # the first leaves each client all of its own
    own = {"strategy__name": strategy, "federation__rounds": 1, "train__learning_rate": 0.1, "data__max_length": 64}
    simulate(text_config(adapter__head="local", adapter__kind=kind, **own), tmp_path / "run")
    passes: list[int] = []
    together = rescoring.score_side_by_side
    monkeypatch.setattr(
        rescoring, "score_side_by_side", lambda model, layers, count, *rest: passes.append(count) or together(
            model, layers, count, *rest
        )
    )  # fmt: skip
    joint = rescore(tmp_path / "run", {})
    assert passes == ([3] if kind == "lora" else [])
    monkeypatch.setattr(rescoring, "AT_ONCE", 1)
    alone = rescore(tmp_path / "run", {})
    assert joint.keys() == alone.keys()
    assert joint["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert joint["accuracy"] == alone["accuracy"]
