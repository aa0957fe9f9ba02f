"""What a ledger comes to: of runs that are done, killed or public in nothing, and of a site over all its runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import ConfigError, LedgerError, RunDirectoryError
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.ledger import EVERYBODY, Entry, Ledger
from fedpeft.privacy.spending import UNFINISHED, read_spending
from fedpeft.privacy.statement import state
from fedpeft.report.privacy import ledger_table
from tests.report.printing import joined, printed

RunMaker = Callable[..., Path]


def entry(
    client: str, at: int, *, run: str = "first", steps: int = 10, noise: float = 1.25, release: str = ""
) -> Entry:
    return Entry(run, client, at, noise, 0.1, steps, release)


def private(**settings: object) -> RunConfig:
    base: dict[str, object] = {
        "privacy.level": "record", "privacy.epsilon": 9.0, "privacy.delta": 1e-4, "privacy.rng": "seeded",
        "train.batch_size": 8, "federation.clients": 3,
    }  # fmt: skip
    return resolve([nest(base), nest({name.replace("__", "."): value for name, value in settings.items()})])


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    def make(config: RunConfig, entries: list[Entry], name: str = "first") -> Path:
        run = tmp_path / name
        run.mkdir()
        (run / "config.toml").write_text(config.to_toml())
        ledger = Ledger.create(run / "ledger.jsonl", "run")
        for each in entries:
            ledger.charge(each)
        return run

    return make


def test_each_client_is_summed_over_all_rounds_at_the_runs_own_delta(make_run: RunMaker) -> None:
    entries = [entry("a", 1), entry("b", 1), entry("a", 3, steps=5, noise=1.5)]
    facts = read_spending(make_run(private(), entries))
    a, b = facts["clients"]
    assert a["epsilon"] == spent([Charge(1.25, 0.1, 10), Charge(1.5, 0.1, 5)], 1e-4).epsilon
    assert b["epsilon"] == spent([Charge(1.25, 0.1, 10)], 1e-4).epsilon
    assert (a["noise_multiplier"], a["sample_rate"], a["steps"]) == ([1.25, 1.5], [0.1, 0.1], 15)
    assert (a["messages"], a["rounds"], b["rounds"]) == (2, [1, 3], [1, 1])
    assert facts["epsilon_max"] == a["epsilon"]
    assert facts["epsilon_median"] == pytest.approx((a["epsilon"] + b["epsilon"]) / 2)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    text = printed(ledger_table(facts))
    for expected in ("1.25 to 1.5", "1-3", "budget  epsilon 9", "at delta 0.0001 (PRV)"):
        assert expected in text


def test_a_run_that_was_killed_is_stated_by_what_its_ledger_holds(make_run: RunMaker) -> None:
    run = make_run(private(), [entry("a", 1), entry("b", 2)])
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"run": "first", "cli')  # half a line, on which nobody trained
    facts = read_spending(run)
    assert len(facts["clients"]) == 2
    assert UNFINISHED in facts["statement"]
    assert "No guarantee" in facts["statement"]
    # 8 rows a batch and a rate of 0.1 are 80 rows, and delta is below 1/80
    assert "is not below" not in facts["statement"]
    assert (
        "for the 80 rows"
        in read_spending(make_run(private(privacy__delta=0.02), [entry("a", 1)], "second"))["statement"]
    )


def test_the_statement_is_that_of_the_run_and_those_never_asked_spent_nothing(make_run: RunMaker) -> None:
    config = private()
    run = make_run(config, [entry("a", 1)])
    told = state(config, {"a": [entry("a", 1).charge], "b": []}, {"a": 80, "b": 80})
    (run / "privacy.json").write_text(json.dumps(told))
    assert UNFINISHED in read_spending(run)["statement"], "no end is on record: it has gone on since"
    (run / "metrics.jsonl").write_text('{"event": "end", "round": 1, "reason": "completed"}\n')
    facts = read_spending(run)
    assert facts["statement"] == told["statement"]
    assert (facts["epsilon_max"], facts["epsilon_median"]) == (told["epsilon_max"], told["epsilon_median"])
    assert [(each["client"], each["epsilon"] == 0, each["rounds"]) for each in facts["clients"]][1] == ("b", True, None)
    printed(ledger_table(facts))


def test_client_level_has_one_account_for_everybody(make_run: RunMaker) -> None:
    config = private(privacy__level="client", federation__clients=50, privacy__delta=0.1)
    facts = read_spending(make_run(config, [entry(EVERYBODY, at, steps=1) for at in (1, 2)]))
    (one,) = facts["clients"]
    assert (one["client"], one["steps"], one["rounds"]) == ("*", 2, [1, 2])
    assert facts["epsilon_max"] == facts["epsilon_median"] == one["epsilon"]
    assert "for the 50 clients" in facts["statement"]
    shown = printed(ledger_table(facts))
    assert "all clients" in shown
    assert "*" not in shown


def test_a_void_mechanism_has_no_epsilon(make_run: RunMaker) -> None:
    facts = read_spending(make_run(private(privacy__sampling="shuffle"), [entry("a", 1)]))
    assert facts["epsilon_max"] is facts["epsilon_median"] is facts["clients"][0]["epsilon"] is None
    assert "shuffle" in facts["statement"]


def test_a_run_that_charged_nothing_yet_spent_nothing(make_run: RunMaker) -> None:
    facts = read_spending(make_run(private(), []))
    assert (facts["clients"], facts["epsilon_max"]) == ([], 0.0)
    assert "nothing was charged yet" in printed(ledger_table(facts))


def test_a_sites_ledger_is_summed_over_all_its_runs(tmp_path: Path) -> None:
    file = tmp_path / "site.jsonl"
    ledger = Ledger.create(file)
    for each in (entry("a", 1), entry("a", 2), entry("a", 1, run="second", release="x")):
        ledger.charge(each)
    facts = read_spending(file, 1e-6, "rdp")
    assert facts["epsilon"] == spent([Charge(1.25, 0.1, 30)], 1e-6, "rdp").epsilon
    assert [(each["run"], each["steps"], each["rounds"]) for each in facts["runs"]] == [
        ("first", 20, [1, 2]),
        ("second", 10, [1, 1]),
    ]
    assert not facts["guarantee"]
    assert "1 of 3 charges are of seeded randomness" in facts["statement"]
    assert "in all  epsilon" in printed(ledger_table(facts))
    assert read_spending(file)["delta"] == 1e-5


def test_secret_randomness_alone_is_no_caveat(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "site.jsonl").charge(entry("a", 1))
    facts = read_spending(tmp_path / "site.jsonl")
    assert facts["guarantee"]
    assert "No guarantee" not in joined(printed(ledger_table(facts)))


def test_a_ledger_in_a_run_directory_is_the_runs(make_run: RunMaker) -> None:
    run = make_run(private(), [entry("a", 1), entry("b", 1)])
    assert read_spending(run / "ledger.jsonl") == read_spending(run)


def test_looking_leaves_nothing_behind(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run(private(), [entry("a", 1)])
    (run / "ledger.jsonl.lock").unlink(missing_ok=True)
    before = sorted(tmp_path.rglob("*"))
    read_spending(run)
    with pytest.raises(RunDirectoryError):
        read_spending(tmp_path / "nowhere" / "site.jsonl")
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_are_one_line(make_run: RunMaker, tmp_path: Path) -> None:
    def refused(path: Path, kind: type[Exception], says: str, **given: Any) -> None:
        with pytest.raises(kind, match=says) as found:
            read_spending(path, **given)
        assert "\n" not in str(found.value)

    run = make_run(private(), [entry("a", 1)])
    refused(tmp_path / "nothing", RunDirectoryError, "no run directory and no ledger file")
    refused(tmp_path, RunDirectoryError, "is no run directory")
    refused(tmp_path / "nothing.jsonl", RunDirectoryError, "no ledger file")
    refused(run, ConfigError, "--delta 0.1 is for a site's ledger", delta=0.1)
    refused(run, ConfigError, "--accountant rdp is for a site's ledger", accountant="rdp")
    plain = make_run(resolve([]), [], "plain")
    refused(plain, ConfigError, "is not private")
    whole = (run / "ledger.jsonl").read_text()
    (run / "ledger.jsonl").write_text(whole.replace("1.25", "9.25"))
    refused(run, LedgerError, "damaged in line 2")
    (run / "ledger.jsonl").write_text('{"run": 1, "noise_multiplier": 1.0}\n')
    refused(run, LedgerError, "of an earlier version, whose lines are not chained")
    (run / "ledger.jsonl").unlink()
    refused(run, LedgerError, "it was removed")
    (run / "metrics.jsonl").write_text('{"event": "round", "round": 1}\n')
    refused(run / "metrics.jsonl", LedgerError, r"metrics\.jsonl' is no privacy ledger")
