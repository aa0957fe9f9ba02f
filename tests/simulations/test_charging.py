"""Simulations whose books must hold whatever happens: never less than what was released."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig
from fedpeft.errors import PrivacyError
from fedpeft.privacy.accounting import Charge, spent
from fedpeft.privacy.ledger import LEDGER, Entry, Ledger
from fedpeft.resident import resident
from fedpeft.runs import Event, read_events
from fedpeft.simulations.simulate import simulate
from tests.conftest import WatchedWorkers

Make = Callable[..., RunConfig]


def private(text_config: Make, **settings: object) -> RunConfig:
    return text_config(**{"privacy__level": "record", "privacy__noise_multiplier": 1.0, **settings})


def statement(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "privacy.json").read_text())
    return found


def entries(run: Path) -> list[Entry]:
    return Ledger(run / LEDGER).entries()


def events(run: Path, kind: str) -> list[Event]:
    return [event for event in read_events(run) if event["event"] == kind]


def test_several_rounds_are_reported_with_the_epsilon_of_several_rounds(text_config: Make, tmp_path: Path) -> None:
    run = simulate(private(text_config, federation__rounds=4), tmp_path / "run").path
    facts = statement(run)
    rows = {client: found["examples"] for client, found in facts["clients"].items()}
    for client, found in facts["clients"].items():
        assert found["steps"] == 12
        whole = spent([Charge(1.0, 8 / rows[client], 12)], 1e-5).epsilon
        assert found["epsilon"] == pytest.approx(whole, rel=1e-12)
        assert whole > 1.5 * spent([Charge(1.0, 8 / rows[client], 3)], 1e-5).epsilon  # of one round
    assert facts["epsilon_max"] == max(found["epsilon"] for found in facts["clients"].values())
    bounds = [event["epsilon_max"] for event in events(run, "round")]
    assert bounds == sorted(bounds)
    assert bounds[-1] >= facts["epsilon_max"]
    assert not facts["guarantee"]
    assert "seeded" in facts["reasons"][0]
    assert all(event["train_loss"] is None for event in events(run, "round"))
    assert all(event["loss"] is None and event["seconds"] is None for event in events(run, "client"))


def test_calibration_takes_the_worst_case_of_rounds_that_a_client_may_be_drawn_into(
    text_config: Make, tmp_path: Path
) -> None:
    settings = {"privacy__noise_multiplier": None, "privacy__epsilon": 4.0, "federation__fraction": 0.34}
    facts = statement(simulate(private(text_config, federation__rounds=3, **settings), tmp_path / "run").path)
    drawn = [found for found in facts["clients"].values() if found["steps"]]
    for found in drawn:
        every_round = spent([Charge(found["noise_multiplier"], found["sample_rate"], 9)], 1e-5).epsilon
        assert 0.97 * 4 < every_round <= 4
        assert found["epsilon"] <= every_round
    assert sum(found["steps"] for found in facts["clients"].values()) == 9  # one client a round
    assert all(found["epsilon"] == 0 for found in facts["clients"].values() if not found["steps"])


@pytest.mark.parametrize("rng", ["seeded", "secure"])
def test_a_worker_that_is_killed_as_it_trains_has_been_paid_for(
    rng: str, text_config: Make, tmp_path: Path, watched_workers: WatchedWorkers
) -> None:
    """A repeat is the same release under a seed, and another one under secure randomness."""
    settings: dict[str, Any] = {"train__local_steps": 5, "privacy__rng": rng, "simulation__workers": 2}
    death = watched_workers.folder / "death"
    death.touch()
    run = simulate(private(text_config, **settings), tmp_path / "run", grid=watched_workers.grid).path
    assert not death.exists()
    if rng == "seeded":  # and the number of workers changes no byte
        alone = simulate(private(text_config, **settings | {"simulation__workers": 0}), tmp_path / "alone").path
        adapter = Path("adapter") / "adapter_model.safetensors"
        assert (run / adapter).read_bytes() == (alone / adapter).read_bytes()
        assert statement(run)["clients"] == statement(alone)["clients"]
    charges = len(entries(run))
    assert charges == (6 if rng == "seeded" else 7)
    steps = sum(found["steps"] for found in statement(run)["clients"].values())
    assert steps == 5 * charges


def test_a_client_that_raises_and_is_asked_again_has_paid_twice_only_if_its_numbers_differ(
    text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpeft.clients.app as module

    for rng, expected in (("seeded", 6), ("secure", 7)):
        real, calls = module.train_locally, []

        def once(*arguments: Any, calls: list[int] = calls, real: Any = real, **settings: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("a client's own trouble")
            return real(*arguments, **settings)

        monkeypatch.setattr(module, "train_locally", once)
        run = simulate(private(text_config, privacy__rng=rng), tmp_path / rng).path
        monkeypatch.undo()
        assert len(entries(run)) == expected
        assert [event["failed"] for event in events(run, "round")] == [0, 0]


def test_a_run_that_is_interrupted_states_what_was_charged(text_config: Make, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event["event"] == "client" and event["round"] == 2:
            raise KeyboardInterrupt

    run = simulate(private(text_config, federation__rounds=5), tmp_path / "run", listener=stop)
    assert run.reason == "interrupted"
    steps = sorted(found["steps"] for found in statement(run.path)["clients"].values())
    assert steps == [3, 3, 6]  # the first client of round 2 has been charged, and no others
    assert (run.path / "adapter" / "adapter_model.safetensors").exists()


def test_clients_out_of_budget_are_passed_over_or_end_the_run(text_config: Make, tmp_path: Path) -> None:
    held = resident(private(text_config)).partition.indices
    fewest = min(len(rows) for rows in held)  # a row of few is in more batches
    one = spent([Charge(1.0, 8 / fewest, 3)], 1e-5).epsilon
    settings = {"privacy__epsilon": one, "federation__rounds": 3}
    skipped = simulate(private(text_config, **settings), tmp_path / "skip")
    assert skipped.rounds == 1  # two rounds would cost more for everybody
    assert skipped.error is not None
    assert "its privacy budget allows no further training" in skipped.reason
    stopped = simulate(private(text_config, privacy__on_exhausted="stop", **settings), tmp_path / "stop")
    assert "privacy.on_exhausted = 'stop'" in stopped.reason
    for run in (skipped.path, stopped.path):
        assert statement(run)["epsilon_max"] == one
    assert len(entries(skipped.path)) == 3


def test_a_budget_that_lasts_for_no_round_is_refused_before_anything_is_written(
    text_config: Make, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match="does not last for one round of any client"):
        simulate(private(text_config, privacy__epsilon=0.1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_held_out_of_the_clients_own_source_are_no_guarantee(text_config: Make, tmp_path: Path) -> None:
    one = statement(simulate(private(text_config, privacy__rng="secure"), tmp_path / "held").path)
    assert not one["guarantee"]
    assert "data.test is not given: 20% of data.source" in one["reasons"][0]
    (tmp_path / "public.csv").write_text("text,label,client\nw1 w59,yes,site-0\nw40 w0,no,site-1\n")
    config = private(text_config, privacy__rng="secure", data__test=str(tmp_path / "public.csv"))
    run = simulate(config, tmp_path / "given").path
    assert statement(run)["guarantee"]
    told = json.loads((run / "adapter" / "privacy.json").read_text())  # whoever is handed the adapter alone
    assert told["statement"] == statement(run)["statement"]
    assert "clients" not in told


def test_a_run_goes_on_without_the_clients_whose_budget_is_spent(
    text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpeft.simulations.charging as module

    real = module.charged
    monkeypatch.setattr(
        module,
        "charged",
        lambda ledger, entry, limits: entry.client != "site-1" and real(ledger, entry, limits),
    )
    run = simulate(private(text_config), tmp_path / "run")
    assert run.reason == "completed"
    assert [(event["clients"], event["exhausted"]) for event in events(run.path, "round")] == [(2, 1), (2, 1)]
    assert statement(run.path)["clients"]["site-1"]["steps"] == 0
    assert {event["client"] for event in events(run.path, "fault")} == {"site-1"}


def test_a_full_disk_stops_training_before_it_is_charged_for(
    text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpeft.privacy.ledger as module
    from fedpeft.errors import LedgerError
    from fedpeft.privacy.ledger import LEDGER

    charged: list[str] = []

    def full(descriptor: int) -> None:
        charged.extend(path for path in [os.readlink(f"/proc/self/fd/{descriptor}")] if path.endswith(LEDGER))
        if len(charged) > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(LedgerError, match="No space left"):
        simulate(private(text_config), tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert [event["guarantee"] for event in events(tmp_path / "run", "privacy")] == [False]
    assert [event["reason"] for event in events(tmp_path / "run", "end")] == ["LedgerError"]
    assert sum(entry.steps for entry in module.Ledger(tmp_path / "run" / LEDGER).entries()) <= 9


@pytest.mark.parametrize("strategy", ["lora-fair", "lora-lego", "flora", "fedrot-lora"])
def test_what_a_server_makes_of_private_updates_costs_nothing_more(
    strategy: str, text_config: Make, tmp_path: Path
) -> None:
    """Post-processing: the very epsilon of FedIT, though these methods need single clients' factors."""
    plain = statement(simulate(private(text_config), tmp_path / "fedit").path)
    facts = statement(simulate(private(text_config, strategy__name=strategy), tmp_path / strategy).path)
    assert facts["clients"] == plain["clients"]


def test_client_level_rounds_are_charged_to_all_before_they_begin(text_config: Make, tmp_path: Path) -> None:
    settings = {"privacy__level": "client", "federation__fraction": 0.5, "strategy__name": "fedit"}
    run = simulate(private(text_config, **settings), tmp_path / "run").path
    facts = statement(run)
    expected = spent([Charge(1.0, 0.5, 2)], 1e-5).epsilon
    for found in facts["clients"].values():
        assert found == {
            "epsilon": pytest.approx(expected),
            "noise_multiplier": 1.0,
            "sample_rate": 0.5,
            "steps": 2,
            "examples": None,
        }
    assert len(facts["clients"]) == 3
    assert {entry.client for entry in entries(run)} == {"*"}
    assert not events(run, "client")
    for event in events(run, "round"):  # how many took part is what amplification keeps secret
        assert all(event[key] is None for key in ("clients", "failed", "bytes_up", "bytes_down", "seconds"))
    live = [event["epsilon_max"] for event in events(run, "round")]
    assert live == [pytest.approx(spent([Charge(1.0, 0.5, count)], 1e-5).epsilon) for count in (1, 2)]
    fixed = simulate(private(text_config, privacy__cohort="fixed", **settings), tmp_path / "fixed").path
    assert {found["sample_rate"] for found in statement(fixed)["clients"].values()} == {1.0}


def test_a_budget_of_clients_ends_the_run_before_the_round_that_would_pass_it(
    text_config: Make, tmp_path: Path
) -> None:
    one = spent([Charge(1.0, 0.5, 1)], 1e-5).epsilon
    settings = {"privacy__level": "client", "federation__fraction": 0.5, "strategy__name": "fedit"}
    outcome = simulate(private(text_config, privacy__epsilon=1.01 * one, **settings), tmp_path / "run")
    assert outcome.rounds == 1
    assert "round 2 would pass privacy.epsilon" in outcome.reason
    assert statement(outcome.path)["epsilon_max"] == pytest.approx(one)
