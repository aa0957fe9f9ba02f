from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fedpeft.config import RunConfig
from fedpeft.report.planned import dry_run_table
from fedpeft.simulations.plan import DryRun
from tests.report.printing import joined, printed

Config = Callable[..., RunConfig]


def planned(config: RunConfig, **facts: Any) -> DryRun:
    known: dict[str, Any] = {
        "parameters": 22_700_000, "trainable": 74_112, "layers": 12, "bytes_up": 2_964_480, "bytes_down": 3_000_000,
        "client_rows": {"a": 10, "b": 20, "c": 30, "d": 40}, "test_rows": 25, "paper": "arXiv 2411.14961",
        "exact": "closest", "needs_single_factors": True, "head_parameters": 384,
    }  # fmt: skip
    return DryRun(config=config, **(known | facts))


def shown(plan: DryRun) -> str:
    return joined(printed(dry_run_table(plan.to_dict(), plan.config)))


def test_a_dry_run_shows_what_would_be_trained_and_moved(config: Config) -> None:
    plan = planned(
        config(federation__rounds=10, federation__fraction=0.5, strategy__name="lora-fair", strategy__solver="cosine")
    )
    assert plan.cohort == 2
    assert plan.total_bytes == 2 * 5_964_480
    text = shown(plan)
    for expected in (
        "lora-fair, solver cosine",
        "must see each client's factors",
        "74,112 parameters a client",
        "averaged over the clients",
        "4 clients, 100 rows: 10 to 40 each",
        "10, with 2 of 4 clients each",
        "296.4 kB up and 300.0 kB down a round",
        "11.9 MB for 10 rounds",
        "Nothing was trained",
    ):
        assert expected in text
    facts = plan.to_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["bytes_up_per_client"] == 296_448


@pytest.mark.parametrize(
    ("head", "words"), [("shared", "averaged"), ("local", "stays with each client"), ("frozen", "left as drawn")]
)
def test_a_dry_run_says_what_the_head_does(config: Config, head: str, words: str) -> None:
    assert words in shown(planned(config(adapter__head=head)))
    without = planned(config(adapter__head=head, model__task="causal-lm"), head_parameters=0)
    assert "none: a causal language model" in shown(without)
    assert without.to_dict()["head"] is None


def test_the_cohort_is_at_least_min_clients_and_at_most_all(config: Config) -> None:
    assert planned(config(federation__fraction=0.01)).cohort == 1
    assert planned(config(federation__fraction=0.01, federation__min_clients=3)).cohort == 3
    assert planned(config()).cohort == 4


def test_bytes_that_depend_on_a_changing_rank_say_so(config: Config) -> None:
    words = "down a round while the rank is 8, which the method may change"
    assert words in shown(planned(config(), changes_rank=True))
    assert words not in shown(planned(config()))


def test_what_should_be_known_of_base_and_rows_is_said_once(config: Config) -> None:
    assert shown(planned(config(), notes=("its texts are cut",))).count("its texts are cut") == 1


def test_a_private_dry_run_says_what_would_be_spent_and_whether_it_is_a_guarantee(config: Config) -> None:
    facts = {
        "level": "record", "noise_multiplier": [1.25, 1.5], "sample_rate": [0.1, 0.1], "steps": [30, 60],
        "calibrated_to": 3.0, "epsilon_max": 2.99901, "delta": 1e-5, "accountant": "prv", "guarantee": False,
        "reasons": ["it is seeded"], "rng": "seeded", "warnings": ["delta is large"], "computed_by": ["prv"],
    }  # fmt: skip
    text = shown(planned(config(), privacy=facts))
    for expected in (
        "privacy record level",
        "noise multiplier 1.25 to 1.5, calibrated to epsilon 3",
        "30 to 60 noised steps a client in all; each row is in each of them with chance 0.1",
        "epsilon 3.000 at delta 1e-05 (PRV), if every client takes part in every round",
        "randomness seeded",
        "guarantee none: it is seeded",
        "warning delta is large",
    ):
        assert expected in text
    assert planned(config(), privacy=facts | {"epsilon_max": float("inf")}).to_dict()["privacy"]["epsilon_max"] is None
    assert "privacy" not in planned(config()).to_dict()
    assert "epsilon" not in shown(planned(config()))
    spared = config(privacy__level="record", privacy__epsilon=3, privacy__spare_rounds=2)
    words = "if every client takes part in every round (the rest is kept for 2 repeats: privacy.spare_rounds)"
    assert words in shown(planned(spared, privacy=facts))
    given = facts | {"calibrated_to": None}  # nothing was calibrated that could keep a rest
    assert "spare_rounds" not in shown(planned(spared, privacy=given))


CLIENT_LEVEL = {
    "level": "client", "noise_multiplier": [1.25, 1.25], "sample_rate": [0.3, 0.3], "steps": [12, 12],
    "calibrated_to": 8.0, "epsilon_max": 7.9999, "delta": 1e-5, "accountant": "prv", "computed_by": ["prv"],
    "guarantee": True, "reasons": [], "rng": "secure", "warnings": [],
}  # fmt: skip


def of_clients(config: Config, facts: dict[str, Any], **settings: object) -> str:
    settings |= {"federation__rounds": 12, "federation__fraction": 0.3}
    chosen = config(privacy__level="client", privacy__epsilon=8, **settings)
    rows = {str(client): 10 for client in range(30)}
    return shown(planned(chosen, client_rows=rows, privacy=facts))


def test_a_poisson_cohort_is_one_on_average_and_epsilon_is_every_clients(config: Config) -> None:
    text = of_clients(config, CLIENT_LEVEL)
    for expected in (
        "rounds 12, each with 9 of 30 clients on average (Poisson)",
        "12 noised sums; each client is in each of them with chance 0.3",
        "epsilon 8.000 at delta 1e-05 (PRV), for every client, whoever took part",
    ):
        assert expected in text
    assert "adaptive" not in text
    assert "adaptive: the norm follows a noised quantile" in of_clients(
        config, CLIENT_LEVEL, privacy__adaptive_clipping=True
    )


def test_a_fixed_cohort_is_accounted_without_amplification_by_the_accountant_that_computed(config: Config) -> None:
    facts = CLIENT_LEVEL | {"sample_rate": [1.0, 1.0], "computed_by": ["gaussian"]}
    text = of_clients(config, facts, privacy__cohort="fixed")
    for expected in (
        "rounds 12, with 9 of 30 clients each",
        "12 noised sums, accounted as if every client were in each (fixed cohort: no amplification, twice the "
        "sensitivity)",
        "at delta 1e-05 (the analytic Gaussian), for every client",
    ):
        assert expected in text
