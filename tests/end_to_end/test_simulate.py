"""Whole runs on tiny models: same bytes everywhere, whatever happens to the workers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedpeft.clients.app
import fedpeft.data.tokens
from fedpeft.config import RunConfig, TrainConfig, nest, resolve
from fedpeft.errors import ConfigError, DataError, ModelError, PrivacyError, RunDirectoryError, TooFewClientsError
from fedpeft.report.terminal import TerminalListener
from fedpeft.rescoring import rescore
from fedpeft.resident import _held
from fedpeft.runs import Event, read_config, read_events
from fedpeft.simulations.simulate import simulate
from tests.conftest import WatchedWorkers

Make = Callable[..., RunConfig]


def adapter_hash(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def events(run: Path, kind: str) -> list[Event]:
    return [event for event in read_events(run) if event["event"] == kind]


@pytest.fixture(scope="module")
def reference(text_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in this process that others are compared with."""
    return simulate(text_config(federation__rounds=2), tmp_path_factory.mktemp("reference") / "run").path


def test_a_run_leaves_what_the_architecture_promises(reference: Path) -> None:
    assert {path.name for path in reference.iterdir()} >= {
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "adapter",
        "checkpoints",
    }
    assert [event["round"] for event in events(reference, "evaluate")] == [0, 1, 2]
    assert {"loss", "accuracy", "macro_f1", "split"} <= events(reference, "evaluate")[0].keys()
    (first, second) = events(reference, "round")
    assert (first["clients"], first["failed"]) == (3, 0)
    assert first["bytes_up"] == second["bytes_down"] > 0
    assert 0 <= second["aggregation_error"] < 1
    assert sorted({event["id"] for event in events(reference, "client")}) == ["site-0", "site-1", "site-2"]
    assert json.loads((reference / "adapter" / "labels.json").read_text()) == ["no", "yes"]
    assert not (reference / ".reserved").exists()
    assert events(reference, "end")[0]["reason"] == "completed"


def test_the_resolved_file_reproduces_the_run(reference: Path, tmp_path: Path) -> None:
    assert adapter_hash(simulate(read_config(reference), tmp_path / "again").path) == adapter_hash(reference)


def test_another_seed_gives_another_adapter(reference: Path, text_config: Make, tmp_path: Path) -> None:
    other = simulate(text_config(federation__rounds=2, run__seed=1), tmp_path / "run").path
    assert adapter_hash(other) != adapter_hash(reference)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_change_a_byte(
    workers: int, reference: Path, text_config: Make, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # one worker of the run's own; two that are shared with other tests
    grid = request.getfixturevalue("watched_workers").grid if workers == 2 else None
    config = text_config(federation__rounds=2, simulation__workers=workers)
    run = simulate(config, tmp_path / "run", grid=grid).path
    assert adapter_hash(run) == adapter_hash(reference)
    assert events(run, "evaluate") == events(reference, "evaluate")
    recorded = [json.loads((each / "environment.json").read_text())["simulation"] for each in (reference, run)]
    assert [facts["workers"] for facts in recorded] == [0, workers]


@pytest.mark.parametrize("strategy", ["rolora", "fedsa-lora", "flora"])
def test_what_clients_keep_from_round_to_round_does_not_depend_on_workers(
    strategy: str, text_config: Make, tmp_path: Path, watched_workers: WatchedWorkers
) -> None:
    settings: dict[str, Any] = {"strategy__name": strategy, "federation__rounds": 3, "federation__fraction": 0.67}
    if strategy == "flora":  # whose clients draw A anew, each of its own rank, on a base that moves
        settings["adapter__ranks"] = "2,4"
    runs = [
        simulate(text_config(**settings, simulation__workers=workers), tmp_path / str(workers), grid=grid).path
        for workers, grid in ((0, None), (2, watched_workers.grid))
    ]
    one, two = ({path.relative_to(run): path.read_bytes() for path in run.rglob("*.safetensors")} for run in runs)
    assert one == two
    assert [events(run, "evaluate") for run in runs[:1]] == [events(run, "evaluate") for run in runs[1:]]
    moved = [[(e["bytes_up"], e["bytes_down"]) for e in events(run, "round")] for run in runs]
    assert moved[0] == moved[1]
    drawn = {event["id"] for event in events(runs[0], "client")}
    personal = {path.parts[-3] for path in runs[0].glob("clients/*/adapter/adapter_model.safetensors")}
    assert personal == (drawn if strategy == "fedsa-lora" else set())


def test_workers_that_keep_hidden_states_give_the_bytes_of_one_process(
    still_bert: Path, text_config: Make, tmp_path: Path, watched_workers: WatchedWorkers
) -> None:
    settings = {"model__name": str(still_bert), "adapter__layers": "last:1", "simulation__prefix_cache": "on"}
    runs = [
        simulate(text_config(simulation__workers=workers, **settings), tmp_path / str(workers), grid=grid).path
        for workers, grid in ((2, watched_workers.grid), (0, None))
    ]
    assert adapter_hash(runs[0]) == adapter_hash(runs[1])
    losses = [[event["loss"] for event in events(run, "evaluate")] for run in runs]
    assert losses[0] == losses[1]


def test_a_cohort_that_the_method_cannot_merge_is_refused_before_anything_is_written(
    text_config: Make, tmp_path: Path
) -> None:
    config = text_config(strategy__name="fedit", strategy__robust="krum")
    with pytest.raises(ConfigError, match="3 clients are drawn"):
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_worker_killed_in_mid_round_is_replaced_and_the_bytes_stay(
    reference: Path, text_config: Make, tmp_path: Path, watched_workers: WatchedWorkers
) -> None:
    death = watched_workers.folder / "death"
    death.touch()
    seen: list[Event] = []
    config = text_config(federation__rounds=2, simulation__workers=2)
    run = simulate(config, tmp_path / "killed", listener=seen.append, grid=watched_workers.grid).path
    assert not death.exists()
    (warning,) = [event["message"] for event in seen if event["event"] == "warning"]
    assert re.fullmatch(r"a worker died over client site-\d and is replaced \(1\)", warning)
    assert adapter_hash(run) == adapter_hash(reference)
    assert [event["failed"] for event in events(run, "round")] == [0, 0]


def test_a_worker_loads_its_base_once_however_many_rounds(
    tiny_bert: Path, text_config: Make, tmp_path: Path, watched_workers: WatchedWorkers
) -> None:
    base = tmp_path / "a base that no worker knows yet"
    shutil.copytree(tiny_bert, base)
    counts: list[Counter[str]] = []

    def count(event: Event) -> None:
        if event["event"] == "round":
            logs = {log.name: log.read_text(encoding="utf-8") for log in watched_workers.folder.glob("opened-*")}
            counts.append(Counter({name: text.count(f"{base}/") for name, text in logs.items() if f"{base}/" in text}))

    config = text_config(model__name=str(base), federation__rounds=4, simulation__workers=2)
    simulate(config, tmp_path / "run", listener=count, grid=watched_workers.grid)
    assert len(counts) == 4
    last = counts[-1]
    assert len(last) in (1, 2)  # it is left to chance whether one worker answers all
    assert len(set(last.values())) == 1, "one loads more often than the other"
    for earlier in counts:
        assert earlier
        assert earlier.items() <= last.items(), "opened again in a later round"


def test_base_and_rows_are_made_once_in_a_process(
    tiny_bert: Path, text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    loads, tokenised = [], []
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    tokenise = fedpeft.data.tokens.tokenise
    monkeypatch.setattr(
        transformers.AutoModelForSequenceClassification,
        "from_pretrained",
        lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs),
    )
    monkeypatch.setattr(fedpeft.data.tokens, "tokenise", lambda *args: tokenised.append(args) or tokenise(*args))
    # what it makes up and tokenises, to see that model and tokenizer agree, are no rows
    monkeypatch.setattr(fedpeft.resident, "agree", lambda *args: None)
    _held.clear()
    simulate(text_config(federation__rounds=4, data__max_length=31), tmp_path / "run")
    assert len(loads) == 1
    assert len(tokenised) == 1
    _held.clear()
    simulate(text_config(federation__rounds=1, data__max_length=31), tmp_path / "again")
    assert len(tokenised) == 1


def causal(tiny_llama: Path, pairs: Path) -> RunConfig:
    return resolve(
        [
            nest(
                {
                    "model.name": str(tiny_llama), "data.source": str(pairs), "data.completion": "completion",
                    "federation.clients": 3, "federation.rounds": 2, "adapter.rank": 2, "train.local_steps": 4,
                    "train.learning_rate": 0.02, "simulation.workers": 0, "strategy.name": "lora-lego",
                    "strategy.rank": 3,
                }
            )
        ]
    )  # fmt: skip


def images(tiny_vit: Path, folder: Path) -> RunConfig:
    return resolve(
        [
            nest(
                {
                    "model.name": str(tiny_vit), "data.source": str(folder), "data.image": "image",
                    "federation.clients": 4, "federation.rounds": 2, "adapter.rank": 2, "train.local_steps": 4,
                    "partition.scheme": "dirichlet", "train.learning_rate": 0.02, "simulation.workers": 0,
                    "adapter.kind": "ffa-lora", "strategy.name": "fedit",
                }
            )
        ]
    )  # fmt: skip


@pytest.mark.parametrize("task", ["text", "images", "causal"])
def test_the_saved_adapter_scores_exactly_what_the_run_reported(
    task: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    if task == "text":
        config = request.getfixturevalue("text_config")(strategy__name="lora-fair")
    elif task == "images":
        config = images(request.getfixturevalue("tiny_vit"), request.getfixturevalue("image_folder"))
    else:
        config = causal(request.getfixturevalue("tiny_llama"), request.getfixturevalue("pairs_jsonl"))
    run = simulate(config, tmp_path / "run").path
    reported = events(run, "evaluate")[-1]
    again = rescore(run, {})
    metrics = ["loss", "perplexity"] if task == "causal" else ["loss", "accuracy", "macro_f1"]
    assert {name: again[name] for name in metrics} == {name: reported[name] for name in metrics}
    assert reported["loss"] < events(run, "evaluate")[0]["loss"]


def test_ffa_lora_leaves_a_as_it_was_drawn_and_sends_only_b(tiny_vit: Path, image_folder: Path, tmp_path: Path) -> None:
    run = simulate(images(tiny_vit, image_folder), tmp_path / "run").path
    first = simulate(
        images(tiny_vit, image_folder).model_copy(update={"train": TrainConfig(learning_rate=1e-12)}),
        tmp_path / "still",
    ).path
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    drawn = load_file(first / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], drawn[name]) for name in final if "lora_A" in name)
    travelled = sum(t.numel() * 4 for name, t in final.items() if "lora_A" not in name)
    assert events(run, "round")[0]["bytes_up"] == 4 * travelled
    assert events(run, "round")[-1]["aggregation_error"] < 1e-6


def test_a_local_head_stays_with_its_client_and_is_saved_for_each(text_config: Make, tmp_path: Path) -> None:
    run = simulate(text_config(adapter__head="local"), tmp_path / "run").path
    heads = [load_file(path) for path in sorted(run.glob("clients/*/adapter/adapter_model.safetensors"))]
    assert len(heads) == 3
    (name,) = [name for name in heads[0] if name.endswith("classifier.weight")]
    assert not torch.equal(heads[0][name], heads[1][name])
    assert all(torch.equal(heads[0][other], heads[1][other]) for other in heads[0] if "lora" in other)
    shared = simulate(text_config(), tmp_path / "shared").path
    assert events(run, "round")[0]["bytes_up"] < events(shared, "round")[0]["bytes_up"]
    again, reported = rescore(run, {}), events(run, "evaluate")[-1]
    assert again["accuracy"] == reported["accuracy"]


def test_a_frozen_head_does_not_move(text_config: Make, tmp_path: Path) -> None:
    runs = [
        simulate(text_config(adapter__head="frozen", federation__rounds=rounds), tmp_path / str(rounds)).path
        for rounds in (1, 2)
    ]
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_client_that_raises_is_reported_with_its_traceback_and_the_round_goes_on(
    text_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = fedpeft.clients.app.train_locally

    def failing(*args: Any, **kwargs: Any) -> Any:
        if args[4].client_id == "site-1":
            raise ValueError("a row that must not travel")
        return train(*args, **kwargs)

    monkeypatch.setattr(fedpeft.clients.app, "train_locally", failing)
    seen: list[Event] = []
    run = simulate(text_config(federation__rounds=1), tmp_path / "run", listener=seen.append).path
    (fault,) = events(run, "fault")
    traceback = run / "faults" / "round-0001-client-site-1.txt"
    (told,) = [event for event in seen if event["event"] == "fault"]
    assert told == fault | {"why": f"a row that must not travel (traceback: {traceback})"}
    assert (fault["client"], fault["reason"]) == ("site-1", "raised twice: ValueError")
    assert events(run, "round")[0]["clients"] == 2
    assert "a row that must not travel" in (run / "faults" / "round-0001-client-site-1.txt").read_text()
    assert "a row that must not travel" not in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({}, DataError("row 7 of his file: flu"), "row 7 of his file: flu"),
        ({"privacy__level": "record"}, DataError("row 7 of his file: flu"), ""),
        ({"privacy__level": "record"}, ModelError("the processor fails: flu"), ""),
        ({"privacy__level": "record"}, PrivacyError("no gradient of each row"), "no gradient of each row"),
        (
            {"privacy__level": "record", "privacy__public_counts": False, "privacy__sample_rate": 0.2},
            PrivacyError("of 40 rows"),
            "",
        ),
        ({"privacy__level": "client", "strategy__name": "fedit"}, DataError("row 7 of his file: flu"), ""),
    ],
)
def test_why_clients_raised_is_told_unless_it_may_quote_private_rows(
    settings: dict[str, Any],
    error: Exception,
    told: str,
    text_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(fedpeft.clients.app, "train_locally", failing)
    noise = {"privacy__noise_multiplier": 1.0} if settings else {}
    config = text_config(federation__rounds=1, **settings, **noise)
    with TerminalListener(config) as listener:
        outcome = simulate(config, tmp_path / "run", listener=listener)
        listener.finish(outcome.path)
    out, err = capsys.readouterr()
    faults = [line for line in err.splitlines() if f"raised twice: {type(error).__name__}" in line]
    assert len(faults) == (1 if config.privacy.level == "client" else 3)  # there, nobody is told who it was
    assert str(error) not in (outcome.path / "metrics.jsonl").read_text(encoding="utf-8")
    if not told:
        assert str(error) not in out + err + str(outcome.error)
        return
    assert [told in line for line in faults] == [True, False, False]  # once, and not for every client
    (end,) = [line for line in out.splitlines() if line.startswith("stopped")]
    assert told in end
    assert told in str(outcome.error)


def test_updates_that_overflow_are_refused_and_what_was_done_is_saved(text_config: Make, tmp_path: Path) -> None:
    outcome = simulate(text_config(train__learning_rate=1e30, train__optimizer="sgd"), tmp_path / "run")
    assert isinstance(outcome.error, TooFewClientsError)
    assert outcome.rounds == 0
    assert all("holds NaN or infinity" in fault["reason"] for fault in events(outcome.path, "fault"))
    assert len(events(outcome.path, "fault")) == 3
    assert (outcome.path / "adapter" / "adapter_model.safetensors").exists()


def test_an_interrupt_saves_the_last_complete_round(text_config: Make, tmp_path: Path) -> None:
    def interrupting(event: Event) -> None:
        if event["event"] == "evaluate" and event["round"] == 1:
            raise KeyboardInterrupt

    outcome = simulate(text_config(federation__rounds=3), tmp_path / "run", listener=interrupting)
    assert (outcome.reason, outcome.rounds) == ("interrupted", 1)
    whole = simulate(text_config(federation__rounds=1), tmp_path / "whole").path
    assert adapter_hash(outcome.path) == adapter_hash(whole)


def test_scores_by_client_come_with_mean_and_worst_tenth(
    text_config: Make, tiny_vit: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = simulate(text_config(run__evaluate_clients=True), tmp_path / "named").path
    scores = events(run, "evaluate")[-1]["clients"]
    assert sorted(scores["scores"]) == ["site-0", "site-1", "site-2"]
    values = [each["accuracy"] for each in scores["scores"].values()]
    assert scores["accuracy"] == {"mean": pytest.approx(sum(values) / 3), "worst_tenth": min(values)}
    mixed = images(tiny_vit, image_folder)
    mixed = mixed.model_copy(update={"run": mixed.run.model_copy(update={"evaluate_clients": True})})
    by_mix = events(simulate(mixed, tmp_path / "mixed").path, "evaluate")[-1]
    assert sorted(by_mix["clients"]["scores"]) == ["0", "1", "2", "3"]


def test_nothing_is_overwritten_and_no_worker_started_for_what_cannot_work(
    reference: Path, text_config: Make, tmp_path: Path
) -> None:
    before = adapter_hash(reference)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        simulate(text_config(), reference)
    assert adapter_hash(reference) == before
    with pytest.raises(ConfigError, match="unknown strategy 'fedat'"):
        simulate(text_config(strategy__name="fedat"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
