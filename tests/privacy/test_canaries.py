"""Planted rows: what they are, whose they are, and what a run leaves of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedpeft.data.tokens
import fedpeft.strategies.rounds.records as records
from fedpeft.cli.app_folder import init_app
from fedpeft.clients.rows import ClientRows, client_rows
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.data.splits import EncodedSplit
from fedpeft.deployment import split_run_config, write_app
from fedpeft.errors import ConfigError, DeploymentError
from fedpeft.privacy.audit import audit_run
from fedpeft.privacy.canaries import Canaries, canaries_of
from fedpeft.privacy.rows import check_rows
from fedpeft.resident import Resident, _held
from fedpeft.runs import Event, read_events
from fedpeft.simulations.simulate import simulate

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def pairs_config(tiny_llama: Path, pairs_jsonl: Path) -> Make:
    def make(**settings: object) -> RunConfig:
        base = {
            "model.name": str(tiny_llama),
            "data.source": str(pairs_jsonl),
            "data.prompt": "prompt",
            "data.completion": "completion",
            "adapter.targets": "q_proj,v_proj",
            "federation.clients": 3,
            "federation.rounds": 1,
            "train.local_steps": 2,
            "simulation.workers": 0,
            "privacy.canaries": 20,
        }
        return resolve([nest(base), nest({name.replace("__", "."): value for name, value in settings.items()})])

    return make


@pytest.fixture(scope="module")
def image_config(tiny_vit: Path, image_folder: Path) -> RunConfig:
    settings = {
        "model.name": str(tiny_vit),
        "data.source": str(image_folder),
        "data.image": "image",
        "federation.clients": 2,
        "privacy.canaries": 12,
    }
    return resolve([nest(settings)])


def planted(home: Resident) -> Canaries:
    canaries = canaries_of(home)
    assert canaries is not None
    return canaries


def client(home: Resident, index: int) -> ClientRows:
    return client_rows(home, {"partition-id": index, "num-partitions": len(home.partition.client_ids)})


def same_rows(one: EncodedSplit, other: EncodedSplit) -> None:
    """Check that two splits make the same batches."""
    for rows in (np.arange(len(one)), np.array([3, 1]), np.arange(len(one))[::-5]):
        left, right = one.batch(rows), other.batch(rows)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_texts_are_copied_with_a_wrong_label_and_the_originals_are_left_alone(text_config: Make) -> None:
    home = Resident(text_config(privacy__canaries=30, data__domain="client"))
    canaries, train = planted(home), home.data.train
    assert len(canaries.split) == len(train) + 30
    same_rows(canaries.split.take(np.arange(len(train))), train)
    copies, sources = canaries.split.batch(canaries.rows), train.batch(canaries.sources)
    assert torch.equal(copies["input_ids"], sources["input_ids"])
    assert torch.equal(copies["attention_mask"], sources["attention_mask"])
    assert (copies["labels"] != sources["labels"]).all()
    assert set(copies["labels"].tolist()) <= {0, 1}
    assert len(set(canaries.sources.tolist())) == 30
    assert canaries.split.domains is not None
    assert train.domains is not None
    assert canaries.split.domains[len(train) :] == tuple(train.domains[row] for row in canaries.sources)


def test_images_are_copied_with_a_wrong_label_and_stay_where_they_are_stored(image_config: RunConfig) -> None:
    home = Resident(image_config)
    canaries, train = planted(home), home.data.train
    same_rows(canaries.split.take(np.arange(len(train))), train)
    mixed = np.array([0, len(train) + 2, 1, len(train)])  # canaries beside other rows
    copies, sources = canaries.split.batch(mixed), train.batch([0, canaries.sources[2], 1, canaries.sources[0]])
    assert torch.equal(copies["pixel_values"], sources["pixel_values"])
    assert (copies["labels"] != sources["labels"]).tolist() == [False, True, False, True]
    assert canaries.split.tensors["pixels"] is train.tensors["pixels"]


def test_every_other_label_is_as_likely(text_config: Make, tmp_path: Path) -> None:
    rows = [f"w{index % 60},{'abcd'[index % 4]}" for index in range(2000)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    settings = {"data__source": str(tmp_path / "rows.csv"), "partition__by": None, "federation__clients": 1}
    base = {"partition__scheme": "iid", "privacy__canaries": 1600}
    home = Resident(text_config(**settings, **base))
    canaries, right = planted(home), home.data.train.labels
    assert right is not None
    assert canaries.split.labels is not None
    shift = (canaries.split.labels[canaries.rows] - right[canaries.sources]) % 4
    counts = torch.bincount(shift, minlength=4).tolist()
    assert counts[0] == 0
    assert all(abs(count - 1600 / 3) < 100 for count in counts[1:])


@pytest.mark.parametrize("max_length", [128, 7])
def test_a_prompt_is_completed_with_the_words_of_another_row(pairs_config: Make, max_length: int) -> None:
    home = Resident(pairs_config(data__max_length=max_length))
    canaries, train = planted(home), home.data.train
    same_rows(canaries.split.take(np.arange(len(train))), train)
    known = {tuple(completion(train, row)) for row in range(len(train))}
    for row, source in zip(canaries.rows, canaries.sources, strict=True):
        assert completion(canaries.split, row) != completion(train, source)
        assert tuple(completion(canaries.split, row)) in known
        inputs, original = canaries.split.batch([row]), train.batch([source])
        length = int((inputs["labels"] == -100).sum())
        prompt = original["input_ids"][0][original["labels"][0] == -100]
        assert 0 < inputs["input_ids"].shape[1] <= max_length
        assert torch.equal(inputs["input_ids"][0, :length], prompt[len(prompt) - length :])


def completion(split: EncodedSplit, row: int) -> list[int]:
    labels = split.batch([row])["labels"][0]
    found: list[int] = labels[labels != -100].tolist()
    return found


def test_rows_coins_and_owners_follow_from_the_seed_alone(text_config: Make) -> None:
    one, again, other = (
        planted(Resident(text_config(privacy__canaries=60, **settings)))
        for settings in ({}, {"train__local_steps": 9}, {"run__seed": 1})
    )
    same_rows(one.split, again.split)
    for name in ("sources", "owners", "included"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.included, other.included)
    assert not np.array_equal(one.sources, other.sources)
    assert np.bincount(one.owners).tolist() == [20, 20, 20]
    assert 15 < one.included.sum() < 45


def test_coins_are_tossed_fairly_and_one_by_one(text_config: Make) -> None:
    coins = np.stack([planted(Resident(text_config(privacy__canaries=90, run__seed=s))).included for s in range(40)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(coins.size)
    assert coins.sum(1).std() > 2.0  # not a fixed number of them


def test_a_client_trains_on_included_canaries_and_counts_all_of_them(text_config: Make) -> None:
    home = Resident(text_config(privacy__canaries=31))
    canaries, seen = planted(home), []
    for index, own in enumerate(home.partition.indices):
        rows = client(home, index)
        assert rows.num_examples == len(own) + (canaries.owners == index).sum() == len(own) + (11, 10, 10)[index]
        assert np.array_equal(rows.indices[: len(own)], own)
        assert rows.split is canaries.split
        seen += rows.indices[len(own) :].tolist()
    assert sorted(seen) == canaries.rows[canaries.included].tolist()
    assert 0 < len(seen) < 31


def test_without_canaries_a_client_has_its_share_and_nothing_else(text_config: Make) -> None:
    home = Resident(text_config())
    assert canaries_of(home) is None
    rows = client(home, 1)
    assert rows.split is home.data.train
    assert rows.indices is home.partition.indices[1]
    assert rows.num_examples == len(rows.indices)


def test_more_canaries_than_rows_are_refused_before_anything_is_written(text_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.canaries = 1000.*96 training rows"):
        simulate(text_config(privacy__canaries=1000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_made_wrong_are_refused(pairs_config: Make, tmp_path: Path) -> None:
    pairs = [{"prompt": f"w{index}", "completion": "w1"} for index in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    home = Resident(pairs_config(data__source=str(tmp_path / "pairs.jsonl")))
    with pytest.raises(ConfigError, match="one completion"):
        check_rows(home)


def test_deployments_refuse_canaries(text_config: Make, text_csv: Path, tmp_path: Path) -> None:
    config = text_config(privacy__canaries=20)
    with pytest.raises(DeploymentError, match="simulations only"):
        init_app(tmp_path / "app", config, None)
    assert not (tmp_path / "app").exists()
    write_app(tmp_path / "app", text_config(), tmp_path / "run", ("no", "yes"))
    with pytest.raises(DeploymentError, match="simulations only"):  # as `flwr run --run-config` may ask for
        split_run_config({**config.to_flat(), "deployment.out": "/runs/one"})
    with pytest.raises(DeploymentError, match="false rows among a site's own"):
        client_rows(Resident(config), {"data": str(text_csv), "client-id": "site"})


@pytest.fixture(scope="module")
def audited(text_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns its canaries by heart, more or less."""
    settings = {"federation__rounds": 2, "train__local_steps": 30, "train__learning_rate": 0.03}
    config = text_config(privacy__canaries=60, adapter__targets="all-linear", **settings)
    return simulate(config, tmp_path_factory.mktemp("audited") / "run").path


def scores_of(run: Path) -> dict[str, list[float]]:
    """Read canaries.json, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    held: dict[str, list[float]] = json.loads((run / "canaries.json").read_text(), parse_constant=refuse)
    return held


def test_a_run_scores_its_canaries_and_the_audit_reads_them(audited: Path, text_config: Make) -> None:
    held = scores_of(audited)
    assert held.keys() == {"included", "scores", "clients", "loss_before", "loss_after"}
    assert {len(column) for column in held.values()} == {60}
    canaries = planted(Resident(text_config(privacy__canaries=60)))
    assert held["included"] == canaries.included.tolist()
    assert held["clients"] == [f"site-{owner}" for owner in canaries.owners]
    before, after = np.array(held["loss_before"]), np.array(held["loss_after"])
    assert np.allclose(held["scores"], before - after)
    coins = np.array(held["included"])
    assert np.array(held["scores"])[coins].mean() > np.array(held["scores"])[~coins].mean()
    found = audit_run(audited)
    assert (found["canaries"], found["included"], found["claimed_epsilon"]) == (60, int(coins.sum()), None)


def test_public_row_counts_hold_every_canary(audited: Path) -> None:
    counts = {event["id"]: event["num_examples"] for event in read_events(audited) if event["event"] == "client"}
    assert sum(counts.values()) == 96 + 60


def test_a_private_run_is_held_against_its_own_statement(text_config: Make, tmp_path: Path) -> None:
    config = text_config(privacy__canaries=60, privacy__level="record", privacy__noise_multiplier=2.0)
    run = simulate(config, tmp_path / "run").path
    found = audit_run(run)
    assert found["claimed_epsilon"] == json.loads((run / "privacy.json").read_text())["epsilon_max"] > 0
    assert not found["violated"]
    # the sample rate is that of the public row count, ghosts included
    clients = json.loads((run / "privacy.json").read_text())["clients"]
    assert sum(client["examples"] for client in clients.values()) == 96 + 60
    assert all(client["sample_rate"] == pytest.approx(8 / client["examples"]) for client in clients.values())
    without = text_config(privacy__canaries=60, privacy__level="record", privacy__noise_multiplier=0.0)
    assert audit_run(simulate(without, tmp_path / "without").path)["claimed_epsilon"] is None


def test_rows_are_tokenised_once_for_runs_with_and_without_canaries(
    text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised = []
    tokenise = fedpeft.data.tokens.tokenise
    monkeypatch.setattr(fedpeft.data.tokens, "tokenise", lambda *args: tokenised.append(args) or tokenise(*args))
    # what it makes up and tokenises, to see that model and tokenizer agree, are no rows
    monkeypatch.setattr(fedpeft.resident, "agree", lambda *args: None)
    _held.clear()
    simulate(text_config(federation__rounds=1, data__max_length=29), tmp_path / "plain")
    simulate(text_config(federation__rounds=1, data__max_length=29, privacy__canaries=12), tmp_path / "planted")
    assert len(tokenised) == 1


def test_no_canaries_leave_no_trace(text_config: Make, tmp_path: Path) -> None:
    run = simulate(text_config(privacy__canaries=0), tmp_path / "run").path
    assert not (run / "canaries.json").exists()
    default = simulate(text_config(), tmp_path / "default").path
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (default / name).read_bytes()
    other = simulate(text_config(privacy__canaries=12), tmp_path / "planted").path
    assert (other / name).read_bytes() != (default / name).read_bytes()


@pytest.mark.parametrize("strategy", ["fedsa-lora", "flora"])
def test_personal_parts_and_a_base_that_moved_are_scored_as_the_server_holds_them(
    strategy: str, text_config: Make, tmp_path: Path
) -> None:
    # with a personal head as well as B, the server's model would stay as it was
    config = text_config(privacy__canaries=12, strategy__name=strategy, adapter__head="shared")
    run = simulate(config, tmp_path / "run").path
    held = scores_of(run)
    assert all(np.isfinite(held["loss_after"]))
    assert np.ptp(held["scores"]) > 0


def test_prompts_are_scored_by_their_completions_tokens(pairs_config: Make, tmp_path: Path) -> None:
    held = scores_of(simulate(pairs_config(), tmp_path / "run").path)
    # an untrained model of 63 words knows nothing, whatever the length of a completion
    assert np.allclose(held["loss_before"], np.log(63), atol=0.3)


def test_an_interrupted_run_scores_its_last_adapter(text_config: Make, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event["event"] == "round" and event["round"] == 1:
            raise KeyboardInterrupt

    config = text_config(privacy__canaries=12, federation__rounds=5)
    outcome = simulate(config, tmp_path / "run", listener=stop)
    assert outcome.reason == "interrupted"
    assert len(scores_of(outcome.path)["scores"]) == 12


def test_a_diverged_loss_is_written_as_null(text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = records.write_scores

    def diverged(path: Path, home: Resident, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
        write(path, home, before, {name: torch.full_like(tensor, np.nan) for name, tensor in after.items()})

    monkeypatch.setattr(records, "write_scores", diverged)
    run = simulate(text_config(privacy__canaries=40), tmp_path / "run").path
    assert scores_of(run)["scores"] == [None] * 40
    assert audit_run(run)["epsilon_lower_bound"] == 0.0


def test_the_adapter_outlives_scores_that_cannot_be_written(
    text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_scores", full)
    events: list[Event] = []
    run = simulate(text_config(privacy__canaries=12), tmp_path / "run", listener=events.append).path
    assert load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(event["event"] == "warning" and "No space left" in event["message"] for event in events)
    assert events[-1]["event"] == "end"
