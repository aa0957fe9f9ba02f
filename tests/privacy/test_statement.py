"""What a run claims: the worst case over clients, and no number where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.adapters.state import ClientUpdate, PrivacyClaim, TrainMetrics
from fedpeft.config import RunConfig
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.books import Books
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.mechanism import record_mechanism
from fedpeft.privacy.statement import state
from fedpeft.rounding import as_given, upwards
from fedpeft.runs import RunDirectory
from fedpeft.server import _log_event

Make = Callable[..., RunConfig]
CHARGES = {"a": [Charge(1.1, 0.2, 5), Charge(1.1, 0.2, 5)], "b": [Charge(0.9, 0.1, 5)], "c": []}
EXAMPLES = {"a": 500, "b": 1000, "c": 2000}


def secure(text_config: Make, **settings: object) -> RunConfig:
    base = {"privacy__level": "record", "privacy__noise_multiplier": 1.0, "privacy__rng": "secure"}
    return text_config(**base | settings)


def test_the_worst_client_over_all_rounds_counts(text_config: Make) -> None:
    facts = state(secure(text_config), CHARGES, EXAMPLES)
    each = {client: spent(held, 1e-5).epsilon for client, held in CHARGES.items()}
    assert facts["epsilon_max"] == max(each.values())
    assert facts["epsilon_median"] == (each["a"] + each["b"]) / 2  # of those that trained
    assert each["a"] == spent([Charge(1.1, 0.2, 10)], 1e-5).epsilon
    assert facts["clients"]["a"]["steps"] == 10
    nothing = {"epsilon": 0.0, "noise_multiplier": None, "sample_rate": None, "steps": 0, "examples": 2000}
    assert facts["clients"]["c"] == nothing
    assert facts["guarantee"] is True
    assert facts["reasons"] == facts["warnings"] == []
    assert upwards(facts["epsilon_max"]) in facts["statement"]
    for words in (
        "keeps to the protocol",
        "Poisson",
        "row counts",
        "tokenizer",
        "label set",
        "floating point",
        "all rounds",
    ):
        assert words in facts["statement"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy__sampling": "shuffle"}, "shuffle"),
        ({"privacy__release_metrics": True}, "losses leave"),
        ({"privacy__noise_multiplier": 0.0}, "no noise"),
    ],
)
def test_a_choice_that_voids_the_guarantee_leaves_no_number(
    settings: dict[str, Any], words: str, text_config: Make
) -> None:
    facts = state(secure(text_config, **settings), CHARGES, EXAMPLES)
    assert facts["epsilon_max"] is facts["epsilon_median"] is None
    assert facts["guarantee"] is False
    assert facts["statement"].startswith("No guarantee")
    assert "epsilon =" not in facts["statement"]
    assert words in facts["statement"]
    assert {found["epsilon"] for found in facts["clients"].values()} == {None}
    json.dumps(facts, allow_nan=False)


def test_an_epsilon_without_end_is_no_guarantee(text_config: Make) -> None:
    facts = state(secure(text_config, privacy__noise_multiplier=1e-9), {"a": [Charge(1e-9, 0.5, 3)]}, {"a": 100})
    assert facts["epsilon_max"] is None
    assert facts["guarantee"] is False
    assert "too small for any finite epsilon" in facts["statement"]


def test_what_an_attack_may_find_is_said_in_plain_words(text_config: Make) -> None:
    facts = state(secure(text_config), {"a": [Charge(2.824, 0.172, 120)]}, {"a": 186})
    assert upwards(facts["epsilon_max"]) == "2.998"
    assert "finds at most 20.1 in 100" in facts["statement"]  # e^2.998 / 100 = 0.2004, rounded up
    facts = state(secure(text_config), {"a": [Charge(0.6, 0.172, 120)]}, {"a": 186})
    assert facts["epsilon_max"] > 20
    assert "finds at most 100 in 100" in facts["statement"]


def test_a_run_in_which_nobody_trained_claims_no_epsilon(text_config: Make) -> None:
    facts = state(secure(text_config), {"a": [], "b": []}, EXAMPLES)
    assert facts["statement"] == "Nobody trained, so that nothing was spent."


def test_planted_rows_are_warned_of(text_config: Make) -> None:
    facts = state(secure(text_config, privacy__canaries=60), CHARGES, EXAMPLES)
    assert "60 false rows were planted" in facts["statement"]


def test_seeded_randomness_is_no_guarantee_but_has_a_number(text_config: Make) -> None:
    facts = state(secure(text_config, privacy__rng="seeded"), CHARGES, EXAMPLES)
    assert facts["guarantee"] is False
    assert facts["epsilon_max"] > 0
    assert "can replay" in facts["statement"]


def test_a_delta_that_lets_a_row_go_in_the_clear_is_warned_of(text_config: Make) -> None:
    assert "2000 rows" in state(secure(text_config, privacy__delta=0.0005), CHARGES, EXAMPLES)["warnings"][0]
    assert not state(secure(text_config, privacy__delta=0.00049), CHARGES, EXAMPLES)["warnings"]
    hidden = {"privacy__public_counts": False, "privacy__sample_rate": 0.1}
    (warning,) = state(secure(text_config, privacy__delta=0.05, **hidden), CHARGES, {})["warnings"]  # 8 / 0.1 rows
    assert "not below 1/n" in warning
    (warning,) = state(secure(text_config, privacy__delta=0.01, **hidden), CHARGES, {}, largest=100)["warnings"]
    assert "100" not in warning  # which nobody is told
    assert not state(secure(text_config, privacy__delta=0.009, **hidden), CHARGES, {}, largest=100)["warnings"]
    client = secure(text_config, privacy__level="client", privacy__delta=0.4)
    assert "3 clients" in state(client, CHARGES, {})["warnings"][0]


def test_a_trusted_server_and_kept_parts_are_named(text_config: Make) -> None:
    facts = state(secure(text_config, privacy__level="client"), CHARGES, {})
    assert "SERVER IS TRUSTED" in facts["statement"]
    assert "add or remove one client" in facts["adjacency"]
    fixed = state(secure(text_config, privacy__level="client", privacy__cohort="fixed"), CHARGES, {})
    assert "replace one client" in fixed["adjacency"]
    assert "twice the sensitivity" in fixed["sampling"]
    client = secure(text_config, privacy__level="client")
    kept = state(client, CHARGES, {}, kept=["B", "head"])
    assert "B and head stays with each client" in kept["statement"]
    assert kept["guarantee"] is False  # test scores are records of the run too
    assert not state(secure(text_config), CHARGES, EXAMPLES, kept=["B"])["warnings"]  # DP-SGD covers all


def test_without_public_counts_the_statement_holds_no_client(text_config: Make) -> None:
    config = secure(text_config, privacy__public_counts=False, privacy__sample_rate=0.2)
    facts = state(config, CHARGES, {})
    assert facts["clients"] == {}
    assert facts["epsilon_max"] > 0
    assert not any("row counts" in word for word in facts["public"])


def test_a_site_may_go_beyond_a_runs_budget_and_the_server_says_so(text_config: Make, tmp_path: Path) -> None:
    config = secure(text_config, privacy__epsilon=1.0)
    books = Books(config, RunDirectory(tmp_path / "run", config, 1), {}, told=True)
    books.settle(1, {"a": 1}, [told("a", 300)])
    assert books.epsilon_max() == spent([Charge(1.0, 0.25, 300)], 1e-5).epsilon > 1.0


def test_who_computed_the_numbers_is_named(text_config: Make) -> None:
    config = secure(text_config)
    every = {"a": [Charge(1.0, 1.0, 5)], "b": [Charge(1.0, 0.1, 5)]}
    assert "the analytic Gaussian and PRV" in state(config, every, EXAMPLES)["statement"]
    assert "analytic" not in state(config, CHARGES, EXAMPLES)["statement"]
    assert "RDP" in state(secure(text_config, privacy__accountant="rdp"), CHARGES, EXAMPLES)["statement"]


def test_rounding_in_bf16_is_named(text_config: Make) -> None:
    assert "bf16" in state(secure(text_config, train__precision="bf16"), CHARGES, EXAMPLES)["warnings"][0]


def test_numbers_are_rounded_up() -> None:
    assert [upwards(value) for value in (2.9990001, 3.0, 0.0, float("inf"))] == ["3.000", "3.000", "0.000", "infinity"]
    assert [upwards(value) for value in (2.999, 3.0000000001, 1e-12)] == ["2.999", "3.001", "0.001"]
    assert upwards(3.00004, digits=4) == "3.0001"
    assert [as_given(budget) for budget in (3.0, 0.5, 3.0000004, 200.0)] == ["3", "0.5", "3.0000004", "200"]


def test_a_server_prints_epsilon_rounded_up(capsys: pytest.CaptureFixture[str]) -> None:
    _log_event({"event": "round", "round": 1, "epsilon_max": 3.00004, "train_loss": 0.50004})
    assert capsys.readouterr().out == "event=round round=1 epsilon_max=3.0001 train_loss=0.5000\n"


def test_the_same_noise_for_all_where_counts_are_private(text_config: Make) -> None:
    config = secure(text_config, privacy__public_counts=False, privacy__sample_rate=0.2)
    assert record_mechanism(config, 10) == record_mechanism(config, 10_000)
    public = secure(text_config, privacy__noise_multiplier=None, privacy__epsilon=3.0)
    few, many = record_mechanism(public, 20), record_mechanism(public, 2000)
    assert few.noise_multiplier > many.noise_multiplier
    assert few.denominator == many.denominator == 8
    small = record_mechanism(public, 5)
    assert (small.sample_rate, small.denominator) == (1.0, 5.0)


# --- books of a deployment ---------------------------------------------------------------------------------------


def told(client: str, steps: int, noise: float = 1.0, rate: float = 0.25, per_round: int | None = 3) -> ClientUpdate:
    return ClientUpdate(client, 32, {}, {}, TrainMetrics(per_round, spent=PrivacyClaim(noise, rate, steps)))


def test_a_server_takes_sites_at_their_word_and_assumes_the_worst_of_those_that_say_nothing(
    text_config: Make, tmp_path: Path
) -> None:
    config = secure(text_config)
    books = Books(config, RunDirectory(tmp_path / "run", config, 1), {}, told=True)
    books.settle(1, {"a": 1, "b": 2, "c": 1}, [told("a", 3), told("b", 6)])
    books.settle(1, {"a": 9}, [told("a", 99)])  # a round counts once
    books.settle(2, {"a": 1, "b": 2}, [told("a", 6)])  # b was asked twice and said nothing
    facts = books.close(["a", "b", "c", "d"])
    assert {client: found["steps"] for client, found in facts["clients"].items()} == {"a": 6, "b": 12, "c": 0, "d": 0}
    assert "c was asked to train and never answered" in facts["reasons"][0]
    assert facts["guarantee"] is False
    assert facts["epsilon_max"] is None
    assert "site's own ledger" in facts["warnings"][-1]
    assert books.epsilon_max() == spent([Charge(1.0, 0.25, 12)], 1e-5).epsilon
    assert len(Ledger(tmp_path / "run" / "ledger.jsonl").entries()) == 4


def test_a_site_that_keeps_the_steps_of_a_round_to_itself_ends_no_run(text_config: Make, tmp_path: Path) -> None:
    config = secure(text_config)
    books = Books(config, RunDirectory(tmp_path / "run", config, 1), {}, told=True)
    books.settle(1, {"a": 1}, [told("a", 3, per_round=None)])
    books.settle(2, {"a": 1}, [])
    assert [charge.steps for charge in books.charges()["a"]] == [3, 3]


@pytest.mark.parametrize("wrong", [{"steps": 2**60}, {"noise": -1.0}, {"noise": math.nan}, {"rate": 7.0}])
def test_a_site_that_talks_nonsense_ends_no_run(wrong: dict[str, Any], text_config: Make, tmp_path: Path) -> None:
    config = secure(text_config)
    books = Books(config, RunDirectory(tmp_path / "run", config, 1), {}, told=True)
    books.settle(1, {"a": 1}, [told("a", **{"steps": 3, **wrong})])
    assert "never answered" in books.close(["a"])["reasons"][0]


def test_where_counts_are_private_a_server_charges_what_it_asked_for(text_config: Make, tmp_path: Path) -> None:
    config = secure(text_config, privacy__public_counts=False, privacy__sample_rate=0.2)
    books = Books(config, RunDirectory(tmp_path / "run", config, 1), {}, told=True)
    books.settle(1, {"a": 1, "b": 2}, [ClientUpdate("a", 1, {})])
    assert books.charges() == {
        "a": [Charge(1.0, 0.2, 3)],
        "b": [Charge(1.0, 0.2, 6)],
    }
    assert books.epsilon_max() == spent([Charge(1.0, 0.2, 6)], 1e-5).epsilon
