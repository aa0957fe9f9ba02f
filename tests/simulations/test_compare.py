"""Comparisons: what is run, what is not run again, and the two bounds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig, configure
from fedpeft.errors import ConfigError, RunDirectoryError
from fedpeft.runs import Event, read_events
from fedpeft.runs.history import History
from fedpeft.simulations import running
from fedpeft.simulations.compare import split_words, write_comparison
from fedpeft.simulations.jobs import bounds, plan_jobs
from fedpeft.simulations.running import Compared, run_jobs
from fedpeft.strategies.rounds.records import Outcome


def run(words: list[str], config: RunConfig, out: Path, seeds: int = 1) -> tuple[list[str], Compared]:
    told: list[str] = []
    rows, _ = split_words(words)
    return told, run_jobs(plan_jobs(rows, config, seeds, out), config, tell=told.append)


def test_methods_are_told_from_configuration() -> None:
    words = [
        "fedit",
        "my.toml",
        "fedit:server_optimizer=adam,server_tau=0.1",
        "data.source=C:/x.csv",
        "train.batch_size=4",
    ]
    rows, rest = split_words([*words, "fedit:adapter.kind=ffa-lora", "centralized"])
    assert rest == ["my.toml", "data.source=C:/x.csv", "train.batch_size=4"]
    assert [(row.method, row.settings) for row in rows] == [
        ("fedit", {}),
        ("fedit", {"strategy": {"server_optimizer": "adam", "server_tau": "0.1"}}),
        ("fedit", {"adapter": {"kind": "ffa-lora"}}),
        ("centralized", {}),
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fedti"], "unknown method 'fedti'. Did you mean 'fedit'"),
        (["centralised"], "Did you mean 'centralized'"),
        (["train.batch_size=4"], "no method to compare"),
        (["fedit", "fedit"], "twice"),
        (["fedit:adam"], "'adam' in 'fedit:adam' is not of the form option=value"),
        (["local", "fedit:solver=cosine"], "strategy 'fedit' has no option 'solver'"),
        (["local", "lora-fair:regularization=-1"], "regularization"),
        (["local", "rolora:adapter.kind=ffa-lora"], "rolora"),
    ],
)
def test_mistakes_come_out_before_anything_runs(words: list[str], says: str, text_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        run(words, text_config(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_upper_bound_has_all_rows_and_a_cohorts_steps(text_config: Any, tmp_path: Path) -> None:
    rows, _ = split_words(["centralized"])
    (job,) = plan_jobs(rows, text_config(federation__fraction=0.67), 1, tmp_path)
    assert job.config.strategy.name == "fedit"
    assert (job.config.partition.scheme, job.config.partition.by, job.config.federation.clients) == ("iid", None, 1)
    assert job.config.train.local_steps == 2 * 3  # of the three sites, which only the rows name, two are drawn
    (job,) = plan_jobs(rows, text_config(train__local_epochs=2), 1, tmp_path)
    assert (job.config.train.local_steps, job.config.train.local_epochs) == (None, 2)


def test_what_is_not_set_is_left_to_the_method_and_options_to_their_own(text_config: Any, tmp_path: Path) -> None:
    rows, _ = split_words(["fed-sb", "fedit", "lora-fair", "lora-fair:solver=cosine"])
    config = text_config(strategy__name="lora-fair", strategy__regularization=0.5)
    sb, fedit, fair, cosine = (job.config for job in plan_jobs(rows, config, 1, tmp_path))
    assert (sb.adapter.kind, fedit.adapter.kind) == ("lora-xs", "lora")
    assert "regularization" not in fedit.strategy.options
    assert fair.strategy.options == {"regularization": 0.5, "solver": "closed-form"}
    assert cosine.strategy.options == {"regularization": 0.5, "solver": "cosine"}


def test_own_rows_are_scored_where_they_can_be_and_no_privacy_forbids_it(
    text_config: Any, tiny_llama: Path, pairs_jsonl: Path, tmp_path: Path
) -> None:
    private = "fedit:privacy.level=record,privacy.noise_multiplier=1"
    rows, _ = split_words(["fedit", private, "fedit:run.evaluate_clients=false"])
    scored = [job.config.run.evaluate_clients for job in plan_jobs(rows, text_config(), 1, tmp_path)]
    assert scored == [True, False, False]
    with pytest.raises(ConfigError, match=r"run\.evaluate_clients = true weighs scores"):
        plan_jobs(rows, text_config(run__evaluate_clients=True), 1, tmp_path)
    rows, _ = split_words(["fedit"])
    pairs = {"model.name": str(tiny_llama), "data.source": str(pairs_jsonl), "data.prompt": "prompt"}
    pairs |= {"data.completion": "completion", "federation.clients": "2"}
    (job,) = plan_jobs(rows, configure(pairs), 1, tmp_path)  # with neither label, domain nor client
    assert not job.config.run.evaluate_clients


def test_what_is_personal_is_decided_by_each_row(text_config: Any, tmp_path: Path) -> None:
    rows, _ = split_words(["fedsa-lora", "fedsa-lora:adapter.head=shared", "local", "fedit"])
    heads = [job.config.adapter.head for job in plan_jobs(rows, text_config(), 1, tmp_path)]
    assert heads == ["local", "shared", "local", "shared"]


def test_bounds_of_mixed_ranks_have_the_largest(text_config: Any, tmp_path: Path) -> None:
    rows, _ = split_words(["centralized", "local", "flora"])
    config = text_config(adapter__ranks="2,4")
    for job in plan_jobs(rows, config, 1, tmp_path):
        assert (job.config.adapter.rank, job.config.adapter.ranks) == (4, (2, 4) if job.label == "flora" else None)


def test_runs_are_compared_and_done_ones_are_kept(
    text_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, config, out = ["centralized", "local", "lora-fair:regularization=0.5"], text_config(run__seed=5), tmp_path
    rows, _ = split_words(words)
    jobs = plan_jobs(rows, config, 2, out)
    assert [(job.label, job.seed) for job in jobs[:4]] == [*((word, 5) for word in words), ("centralized", 6)]
    true_simulate = running.simulate
    begun: list[Path] = []

    def stops_at_the_third(own: RunConfig, path: Path, **settings: Any) -> Outcome:
        begun.append(path)
        return true_simulate(own, path, **settings, **({"listener": stop} if len(begun) == 3 else {}))

    def stop(event: Event) -> None:
        if event["event"] == "client" and event["round"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(running, "simulate", stops_at_the_third)
    told, compared = run(words, config, out, seeds=2)
    assert compared.interrupted
    assert len(compared.runs) == len(told) == 2
    assert write_comparison(jobs, compared, out)["rows"][0]["runs"] == 1
    told, compared = run(words, config, out, seeds=2)
    assert not compared.interrupted
    assert [line.endswith("done before") for line in told] == [True, True, False, False, False, False]
    assert len(begun) == 3 + 3  # the third went on where it was
    assert json.loads((begun[2] / "environment.json").read_text())["resumes"][0]["round"] == 1
    assert "ETA" in told[2]
    facts = write_comparison(jobs, compared, out)
    assert json.loads((out / "comparison.json").read_text()) == facts
    assert "| local |" in (out / "comparison.md").read_text()
    by_method = {row["method"]: row for row in facts["rows"]}
    assert by_method["local"]["bytes"] == 0
    assert by_method["centralized"]["bytes"] is None
    assert by_method["lora-fair:regularization=0.5"]["aggregation_error"] > 0
    assert all(row["runs"] == 2 and row["spread"] is not None for row in facts["rows"])
    assert by_method["centralized"]["own_rows"] is None
    for label in ("local", "lora-fair:regularization=0.5"):  # scored beside all rows, from the same passes
        evaluations = [read_events(job.path) for job in jobs if job.label == label]
        own = [[e for e in events if e["event"] == "evaluate"][-1]["clients"]["scores"] for events in evaluations]
        means = [statistics.fmean(client["accuracy"] for client in clients.values()) for clients in own]
        assert by_method[label]["own_rows"] == pytest.approx(statistics.fmean(means))
        assert all(len(clients) == 3 for clients in own)
    path = out / "lora-fair_regularization=0.5" / "seed-6"
    last = History.read(path).last
    assert last is not None
    assert [each["score"] for each in facts["runs"] if each["path"] == str(path)] == [last["accuracy"]]
    # what workers do changes no result, what else differs is another run
    assert all(job.is_done for job in plan_jobs(rows, text_config(run__seed=5, simulation__workers=3), 2, out))
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        plan_jobs(rows, text_config(run__seed=5, train__batch_size=4), 2, out)
    with pytest.raises(RunDirectoryError, match="is a run"):
        plan_jobs(rows, config, 2, path)


def test_a_method_that_fails_leaves_the_others(text_config: Any, tmp_path: Path) -> None:
    config = text_config(federation__rounds=1)
    told, compared = run(["fedit:train.learning_rate=1e30,train.optimizer=sgd", "local"], config, tmp_path)
    assert len(compared.failed) == 1
    assert "failed: " in told[0]
    assert [facts["label"] for facts in compared.runs] == ["local"]


def test_workers_that_serve_several_runs_give_the_same_bytes(text_config: Any, tmp_path: Path) -> None:
    files = ("local/seed-1/clients/site-2/adapter", "fedit/seed-0/adapter", "fedit/seed-1/adapter")
    for workers in (0, 1):
        config = text_config(federation__rounds=1, simulation__workers=workers)
        _, compared = run(["local", "fedit"], config, tmp_path / str(workers), seeds=2)
        assert len(compared.runs) == 4
    for file in files:
        inline, ray = (tmp_path / folder / file / "adapter_model.safetensors" for folder in ("0", "1"))
        assert inline.read_bytes() == ray.read_bytes()


def test_a_bound_is_explained_and_a_method_is_not() -> None:
    assert list(bounds()) == ["centralized", "local"]
    assert bounds()["local"] == (
        "local, the lower bound: every client trains alone and sends nothing; its score is the mean over the clients' "
        "own models."
    )
