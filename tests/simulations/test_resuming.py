"""Runs that go on: the bytes of the run that never stopped, whatever is between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig, parse_overrides
from fedpeft.errors import ConfigError, LedgerError, PrivacyError, RunDirectoryError
from fedpeft.privacy.ledger import LEDGER, read_entries
from fedpeft.runs import Event, RunLock, checkpoint_rounds, read_events
from fedpeft.simulations.resuming import caution, is_complete, resumed_config
from fedpeft.simulations.simulate import resume, simulate

Make = Callable[..., RunConfig]
ROUNDS = 3
RECORD = {"privacy__level": "record", "privacy__noise_multiplier": 1.0, "partition__by": "client"}
CLIENT = {"privacy__level": "client", "privacy__noise_multiplier": 0.5, "privacy__adaptive_clipping": True}
KINDS: dict[str, dict[str, Any]] = {
    "server optimiser": {"strategy__name": "fedit", "strategy__server_optimizer": "adam"},
    "personal B and head": {"strategy__name": "fedsa-lora", "federation__fraction": 0.7},
    "kept tensors": {"strategy__name": "rolora", "federation__fraction": 0.7},
    "base that changes": {"strategy__name": "flora"},
    "mixed ranks": {"strategy__name": "hetlora", "adapter__ranks": (2, 1), "strategy__prune": 0.5},
    "record level, seeded": {"strategy__name": "fedit", **RECORD},
    "client level": {"strategy__name": "fedit", **CLIENT, "federation__fraction": 0.6},
    "canaries": {"strategy__name": "fedit", "privacy__canaries": 8},
}


def stopping(server_round: int) -> Callable[[Event], None]:
    """Interrupt a run as soon as a round is on record, before it is scored."""

    def listener(event: Event) -> None:
        if event["event"] == "round" and event["round"] == server_round:
            raise KeyboardInterrupt

    return listener


def timeless(run: Path) -> list[Event]:
    return [{key: value for key, value in event.items() if key != "seconds"} for event in read_events(run)]


def results(run: Path) -> dict[str, bytes]:
    """Return every file that follows from the configuration alone."""
    names = ("*adapter_model.safetensors", "checkpoints/*/state.safetensors", "canaries.json", "clients/*/state/*")
    return {str(path.relative_to(run)): path.read_bytes() for name in names for path in sorted(run.rglob(name))}


@pytest.fixture(scope="module")
def begun(text_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds that was interrupted in its third."""
    config = text_config(federation__rounds=ROUNDS, strategy__name="fedit")
    return simulate(config, tmp_path_factory.mktemp("begun") / "run", listener=stopping(ROUNDS)).path


@pytest.fixture
def copied(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_to_the_bytes_of_one_that_was_not(
    kind: str, text_config: Make, tmp_path: Path
) -> None:
    config = text_config(federation__rounds=ROUNDS, **KINDS[kind])
    whole = simulate(config, tmp_path / "whole").path
    run = simulate(config, tmp_path / "run", listener=stopping(2)).path
    assert checkpoint_rounds(run) == [1]
    heard: list[Event] = []
    outcome = resume(run, listener=heard.append)
    assert (outcome.reason, outcome.rounds) == ("completed", ROUNDS)
    assert "the run goes on after round 1" in [event.get("message") for event in heard]
    assert results(run) == results(whole)
    if "client" not in kind:  # there the broken round was charged for everybody, and is charged again
        assert timeless(run) == timeless(whole)
    if config.privacy.is_private:
        charged, least = (len(read_entries(path / LEDGER)) for path in (run, whole))
        assert charged == least + ("client" in kind)


def test_secure_noise_is_charged_again_for_what_is_trained_again(text_config: Make, tmp_path: Path) -> None:
    config = text_config(federation__rounds=2, strategy__name="fedit", privacy__rng="secure", **RECORD)
    run = simulate(config, tmp_path / "run", listener=stopping(2)).path
    resume(run)
    by_round = [entry.round for entry in read_entries(run / LEDGER)]
    assert [by_round.count(number) for number in (1, 2)] == [3, 6]


@pytest.mark.parametrize("seen", ["moved", "from within"])
def test_a_run_under_another_name_is_the_run_that_it_was_on_its_books(
    seen: str, text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(federation__rounds=2, strategy__name="fedit", **RECORD)
    run = simulate(config, tmp_path / "run", listener=stopping(2)).path
    if seen == "moved":
        run = run.rename(tmp_path / "moved")
        resume(run)
    else:
        monkeypatch.chdir(run)
        resume(Path())
    entries = read_entries(run / LEDGER)
    assert {entry.run for entry in entries} == {"run"}
    assert sorted(entry.round for entry in entries) == [1, 1, 1, 2, 2, 2]


def test_what_a_run_stated_at_its_end_is_gone_before_it_charges_more(text_config: Make, tmp_path: Path) -> None:
    config = text_config(federation__rounds=1, strategy__name="fedit", **RECORD)
    run = simulate(config, tmp_path / "run").path
    stated = [run / "privacy.json", run / "adapter" / "privacy.json"]
    assert all(file.is_file() for file in stated)
    charged = len(read_entries(run / LEDGER))

    def is_gone(event: Event) -> None:
        if event.get("message") == "the run goes on after round 1":
            seen.append((any(file.exists() for file in stated), len(read_entries(run / LEDGER))))

    seen = list[tuple[bool, int]]()
    resume(run, parse_overrides(["federation.rounds=2"]), listener=is_gone)
    assert seen == [(False, charged)]
    assert all(file.is_file() for file in stated)


def test_more_rounds_are_those_of_a_run_that_had_them_from_the_start(text_config: Make, tmp_path: Path) -> None:
    settings = {"strategy__name": "fedit", "strategy__server_optimizer": "yogi", "train__lr_schedule": "constant"}
    whole = simulate(text_config(federation__rounds=3, **settings), tmp_path / "whole").path
    run = simulate(text_config(federation__rounds=2, **settings), tmp_path / "run").path
    resume(run, parse_overrides(["federation.rounds=3", "run.keep_checkpoints=1"]))
    assert timeless(run) == timeless(whole)
    assert checkpoint_rounds(run) == [3]
    assert results(run).items() <= results(whole).items()
    assert is_complete(run, resumed_config(run))


@pytest.mark.parametrize("harmed", [(2,), (1, 2)])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_taken(
    harmed: tuple[int, ...], copied: Path, text_config: Make, tmp_path: Path
) -> None:
    whole = simulate(text_config(federation__rounds=ROUNDS, strategy__name="fedit"), tmp_path / "whole").path
    for server_round in harmed:
        file = copied / "checkpoints" / f"round-{server_round:04d}" / "state.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    heard: list[Event] = []
    resume(copied, listener=heard.append)
    warnings = [event["message"] for event in heard if event["event"] == "warning"]
    assert [f"the checkpoint of round {number} is damaged" in warnings[2 - number] for number in harmed] == [
        True
    ] * len(harmed)
    says = "goes on after round 1" if harmed == (2,) else "begins at round 1: there is no checkpoint to go on from"
    assert f"the run {says}" in [event.get("message") for event in heard]
    assert results(copied) == results(whole)
    assert timeless(copied) == timeless(whole)


def test_what_a_client_keeps_is_a_part_of_the_checkpoint(text_config: Make, tmp_path: Path) -> None:
    config = text_config(federation__rounds=3, strategy__name="fedsa-lora")
    whole = simulate(config, tmp_path / "whole").path
    run = simulate(config, tmp_path / "run", listener=stopping(3)).path
    newest = json.loads((run / "checkpoints/round-0002/state.json").read_text())["clients"]
    (run / "clients" / "site-1" / "state" / f"{newest['site-1']}.safetensors").write_bytes(b"nothing")
    heard: list[Event] = []
    resume(run, listener=heard.append)
    assert any("what client site-1 keeps is damaged" in event.get("message", "") for event in heard)
    assert results(run) == results(whole)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (
            "train.learning_rate=0.5",
            r"train.learning_rate = 0.5 cannot be changed in a run that goes on: it has 0.01. All",
        ),
        ("strategy.name=local", "strategy.name = local cannot be changed in a run that goes on: it has fedit"),
        ("run.seed=1", "run.seed = 1 cannot be changed"),
        ("federation.rounds=1", "federation.rounds = 1, but the run has 3; give as many or more"),
        ("simulation.wokers=1", "unknown key 'simulation.wokers'"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_name(word: str, reason: str, copied: Path) -> None:
    before = (copied / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=reason):
        resume(copied, parse_overrides([word]))
    assert (copied / "config.toml").read_bytes() == before
    assert resumed_config(copied, parse_overrides(["run.seed=0"])).run.seed == 0  # which it has


def test_noise_that_was_calibrated_to_its_rounds_pays_for_no_more(text_config: Make, tmp_path: Path) -> None:
    settings = {"strategy__name": "fedit", "federation__rounds": 1, "privacy__level": "record"}
    run = simulate(text_config(**settings, privacy__epsilon=8.0), tmp_path / "run").path
    with pytest.raises(PrivacyError, match=r"calibrated so that 1 rounds cost privacy.epsilon = 8, and cannot pay"):
        resume(run, parse_overrides(["federation.rounds=2"]))
    assert resumed_config(run).federation.rounds == 1


def test_a_schedule_that_knew_of_fewer_rounds_is_told_of(text_config: Make, tmp_path: Path) -> None:
    config = text_config(federation__rounds=1, train__lr_schedule="cosine", strategy__name="fedit")
    run = simulate(config, tmp_path / "run").path
    more = resumed_config(run, parse_overrides(["federation.rounds=2"]))
    assert "'cosine' went by 1 rounds so far and goes by 2 from here on" in caution(run, more)
    assert caution(run, config) == ""


def test_two_processes_do_not_write_one_run(copied: Path) -> None:
    with RunLock(copied), pytest.raises(RunDirectoryError, match="is being written by process"):
        resume(copied)


def test_a_run_whose_clients_are_elsewhere_is_not_resumed(copied: Path) -> None:
    facts = json.loads((copied / "environment.json").read_text())
    del facts["simulated"]
    (copied / "environment.json").write_text(json.dumps(facts))
    with pytest.raises(RunDirectoryError, match="cannot be resumed: it was not made by `fedpeft simulate`"):
        resume(copied)
    (copied / "environment.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"or its environment.json was lost. Begin it anew: fedpeft simulate /"):
        resume(copied)


def test_a_configuration_that_was_edited_by_hand_is_refused_before_anything_is_written(copied: Path) -> None:
    file, events = copied / "config.toml", (copied / "metrics.jsonl").read_bytes()
    file.write_text(file.read_text().replace("learning_rate = 0.01", "learning_rate = 0.5"))
    with pytest.raises(ConfigError, match=r"train.learning_rate = 0.5 in .* but round 2 was done with 0.01: a run"):
        resume(copied)
    assert (copied / "metrics.jsonl").read_bytes() == events


def test_other_versions_of_what_bytes_depend_on_are_warned_of(copied: Path) -> None:
    facts = json.loads((copied / "environment.json").read_text())
    facts["packages"]["peft"], facts["resumes"] = "0.0.1", "none"
    (copied / "environment.json").write_text(json.dumps(facts))
    heard: list[Event] = []
    resume(copied, listener=heard.append)
    assert any("peft 0.0.1 then, " in str(event.get("message")) for event in heard if event["event"] == "warning")
    assert len(json.loads((copied / "environment.json").read_text())["resumes"]) == 1


def test_a_ledger_that_is_gone_is_missed_before_the_first_event(text_config: Make, tmp_path: Path) -> None:
    config = text_config(federation__rounds=1, strategy__name="fedit", **RECORD)
    run = simulate(config, tmp_path / "run").path
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_bytes(b"")
    (run / LEDGER).unlink()
    with pytest.raises(LedgerError, match="there is no privacy ledger"):
        resume(run)


OWN = (".lock", ".reserved", "metrics.jsonl", ".config.toml", LEDGER, "checkpoints", "clients/site-1/state")


@pytest.mark.parametrize("name", OWN)
def test_a_run_with_a_link_in_it_is_not_gone_on_with_and_what_it_leads_to_stays(
    name: str, copied: Path, tmp_path: Path
) -> None:
    elsewhere, link = tmp_path / "elsewhere", copied / name
    is_folder = "." not in name
    if is_folder:
        elsewhere.mkdir()
        (elsewhere / "theirs.safetensors").write_text("theirs")
        shutil.rmtree(link, ignore_errors=True)
    else:
        elsewhere.write_text("theirs")
        link.unlink(missing_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(RunDirectoryError, match=f"{name}' is a link to '.*elsewhere': a run that goes on would"):
        resume(copied)
    kept = elsewhere / "theirs.safetensors" if is_folder else elsewhere
    assert kept.read_text() == "theirs"


def test_a_run_is_gone_on_with_through_a_link_to_its_folder(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(copied)
    assert resume(tmp_path / "latest").reason == "completed"


@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda file: file.write_bytes(b"".join(file.open("rb").readlines()[:2]))]
)
def test_a_private_run_does_not_go_on_without_all_its_charges(
    harm: Callable[[Path], object], text_config: Make, tmp_path: Path
) -> None:
    config = text_config(federation__rounds=2, strategy__name="fedit", **RECORD)
    run = simulate(config, tmp_path / "run", listener=stopping(2)).path
    harm(run / LEDGER)
    with pytest.raises(LedgerError):
        resume(run)


BEGUN = ("config.toml", "environment.json")


@pytest.mark.parametrize("left", [BEGUN, (*BEGUN, "metrics.jsonl"), (*BEGUN, "metrics.jsonl", LEDGER)])
def test_a_run_that_was_killed_as_it_began_begins_in_the_same_folder(
    left: tuple[str, ...], text_config: Make, tmp_path: Path
) -> None:
    config = text_config(federation__rounds=1, strategy__name="fedit", **RECORD)
    whole = simulate(config, tmp_path / "whole").path
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        if name in ("config.toml", "environment.json"):
            shutil.copy(whole / name, run)
        else:
            (run / name).touch()
    assert resume(run).reason == "completed"
    assert results(run) == results(whole)
    assert json.loads((run / "environment.json").read_text())["simulated"]
