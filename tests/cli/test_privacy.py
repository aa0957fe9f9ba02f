"""``fedpeft privacy``: what it prints, and the one line that bad input gets."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.cli import main
from fedpeft.config import resolve
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.calibration import calibrate
from fedpeft.privacy.ledger import Entry, Ledger
from fedpeft.training.local import num_steps

Run = Callable[..., tuple[int, str, str]]
KEYS = ["noise_multiplier", "epsilon", "delta", "accountant", "sample_rate", "steps"]


@pytest.fixture
def privacy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command below ``fedpeft privacy`` in this process; returns exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpeft", "privacy", *(str(word) for word in words)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return (code, *capsys.readouterr())

    return run


BUDGET = ("noise", "--epsilon", 3, "--rounds", 20)
CLIENT = ("--examples", 500, "--batch-size", 32)


def test_noise_is_calibrated_over_all_rounds_and_its_cost_printed_back(privacy: Run) -> None:
    code, stdout, stderr = privacy(*BUDGET, *CLIENT, "--local-steps", 10, "--delta", "1e-5", "--json")
    assert code == 0
    assert stderr == ""
    facts = json.loads(stdout)
    assert list(facts) == KEYS
    assert facts["noise_multiplier"] == calibrate(3.0, 1e-5, 0.064, 200)
    assert 2.97 < facts["epsilon"] <= 3
    assert (facts["sample_rate"], facts["steps"], facts["accountant"]) == (0.064, 200, "prv")


def test_the_noise_found_costs_what_epsilon_says(privacy: Run) -> None:
    _, stdout, _ = privacy(*BUDGET, *CLIENT, "--local-steps", 10, "--json")
    found = json.loads(stdout)
    words = ("--noise-multiplier", found["noise_multiplier"], "--sample-rate", 0.064, "--steps", 200)
    code, stdout, _ = privacy("epsilon", *words, "--json")
    assert code == 0
    assert json.loads(stdout) == found


def test_epochs_and_sample_rates_stand_in_for_steps_and_batches(privacy: Run) -> None:
    train = resolve([{"train": {"local_epochs": 2, "batch_size": 32}}]).train
    _, by_epochs, _ = privacy(*BUDGET, *CLIENT, "--local-epochs", 2, "--json")
    assert json.loads(by_epochs)["steps"] == 20 * num_steps(train, 500)
    _, by_rate, _ = privacy(*BUDGET, "--sample-rate", 0.064, "--local-epochs", 2, "--json")
    assert by_rate == by_epochs
    _, stdout, _ = privacy(*BUDGET, "--examples", 20, "--batch-size", 32, "--local-steps", 1, "--json")
    assert json.loads(stdout)["sample_rate"] == 1
    assert json.loads(stdout)["accountant"] == "gaussian"


def test_people_get_a_table_and_what_is_assumed(privacy: Run) -> None:
    words = ("--noise-multiplier", 1.1, "--sample-rate", 0.064, "--steps", 200)
    code, stdout, stderr = privacy("epsilon", *words)
    assert code == 0
    assert stderr == ""
    epsilon = spent([Charge(1.1, 0.064, 200)], 1e-5).epsilon
    assert f"{math.ceil(epsilon * 1000) / 1000:.3f}" in stdout
    for part in ("noise multiplier", "Poisson samples", "one record added or removed", "row counts are public"):
        assert part in " ".join(stdout.split())
    _, stdout, _ = privacy("epsilon", *words, "--accountant", "rdp")
    assert "Renyi" in stdout
    _, stdout, _ = privacy("epsilon", "--noise-multiplier", 10, "--sample-rate", 1, "--steps", 2)
    assert "every record is in every step" in " ".join(stdout.split())
    assert "Poisson" not in stdout


def test_without_noise_epsilon_is_infinite(privacy: Run) -> None:
    words = ("epsilon", "--noise-multiplier", 0, "--sample-rate", 0.1, "--steps", 3)
    code, stdout, _ = privacy(*words)
    assert code == 0
    assert "infinity" in stdout
    assert "no privacy: epsilon is infinite" in stdout
    for part in ("Assumed", "accountant"):
        assert part not in stdout
    _, stdout, _ = privacy(*words, "--json")
    assert json.loads(stdout)["epsilon"] is None


def test_a_delta_that_gives_rows_away_is_warned_of(privacy: Run) -> None:
    words = (*BUDGET, *CLIENT, "--local-steps", 10, "--json")
    code, stdout, stderr = privacy(*words, "--delta", 0.002)
    assert code == 0
    assert len(stderr.splitlines()) == 1
    assert "delta 0.002 is no less than 1 / 500 rows" in stderr
    assert list(json.loads(stdout)) == KEYS
    _, _, stderr = privacy(*words, "--delta", 0.0019)
    assert stderr == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*BUDGET, "--local-steps", 10), "--examples and --batch-size, or --sample-rate"),
        ((*BUDGET, "--examples", 500, "--local-steps", 10), "--examples and --batch-size"),
        ((*BUDGET, *CLIENT, "--sample-rate", 0.1, "--local-steps", 10), "give one of them"),
        ((*BUDGET, *CLIENT), "--local-steps and --local-epochs"),
        ((*BUDGET, *CLIENT, "--local-steps", 1, "--local-epochs", 1), "say the same twice; give one of them"),
        ((*BUDGET, *CLIENT, "--local-steps", 0), "--local-steps 0"),
        ((*BUDGET, "--examples", 0, "--batch-size", 32, "--local-steps", 1), "--examples 0"),
        ((*BUDGET, "--sample-rate", 0, "--local-epochs", 1), "--sample-rate 0.0"),
        ((*BUDGET, *CLIENT, "--local-steps", 1, "--delta", 1), "delta = 1.0"),
        ((*BUDGET, *CLIENT, "--local-steps", 1, "--accountant", "gdp"), "no accountant 'gdp'"),
        (("noise", "--epsilon", -1, "--rounds", 1, *CLIENT, "--local-steps", 1), "epsilon = -1.0"),
        (
            ("noise", "--epsilon", 0.05, "--rounds", 1, *CLIENT, "--local-steps", 1, "--accountant", "rdp"),
            "keeps 1 steps at sample rate 0.064 within epsilon 0.05 at delta 1e-05; give a larger budget",
        ),
        (("epsilon", "--noise-multiplier", -1, "--sample-rate", 0.1, "--steps", 1), "noise multiplier -1.0"),
        (("epsilon", "--noise-multiplier", 1, "--sample-rate", 2, "--steps", 1), "sample rate 2.0"),
        (("epsilon", "--noise-multiplier", 1, "--sample-rate", 0.1, "--steps", -1), "steps = -1"),
    ],
)
def test_bad_input_gets_one_line(words: tuple[object, ...], says: str, privacy: Run) -> None:
    code, stdout, stderr = privacy(*words)
    assert code == 2
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("error: ")
    assert says in stderr


def test_a_ledger_is_made_by_a_word_of_its_own(privacy: Run, tmp_path: Path) -> None:
    file = tmp_path / "site" / "books.jsonl"
    code, _, stderr = privacy("ledger", file)
    assert (code, stderr.count("\n")) == (2, 1)
    code, stdout, _ = privacy("ledger", "--create", file)
    assert code == 0
    assert f'privacy-ledger="{file}"' in stdout
    Ledger(file).charge(Entry("7", "north", 1, 1.0, 0.5, 3))
    assert "north" not in privacy("ledger", file)[1]  # a site's is by run
    code, _, stderr = privacy("ledger", "--create", file)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "there already" in stderr
    assert len(Ledger(file).entries()) == 1
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps(vars(Entry("6", "north", at, 1.0, 0.5, 3))) + "\n" for at in (1, 2)))
    code, _, stderr = privacy("ledger", old)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "--create NEW --from" in stderr
    code, stdout, _ = privacy("ledger", "--create", tmp_path / "new", "--from", old, "--json")
    assert json.loads(stdout) == {"ledger": str(tmp_path / "new"), "charges": 2}
    assert json.loads(privacy("ledger", tmp_path / "new", "--json")[1])["runs"][0]["steps"] == 6
    for words in (["ledger"], ["ledger", "--from", old], ["ledger", file, "--create", tmp_path / "third"]):
        code, _, stderr = privacy(*words)
        assert (code, stderr.count("\n")) == (2, 1), words
    assert not (tmp_path / "third").exists()
