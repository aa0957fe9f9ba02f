from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field
from rich.console import Console, RenderableType

from fedpeft.config import RunConfig
from fedpeft.errors import RunDirectoryError
from fedpeft.report.tables import (
    DryRun,
    dry_run_table,
    environment_table,
    partition_view,
    presets_table,
    runs_list,
    runs_table,
    scores_table,
    strategies_dict,
    strategies_table,
)

Events = Callable[..., list[dict[str, Any]]]
Config = Callable[..., RunConfig]
Maker = Callable[..., Path]


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, _environ={})
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def joined(text: str) -> str:
    """Undo the wrapping of cells that stand in the last column."""
    return " ".join(text.split())


# --- strategies


def test_every_method_is_listed_with_its_facts_and_options() -> None:
    from fedpeft.strategies import available

    methods = strategies_dict()
    assert json.loads(json.dumps(methods)) == methods
    assert [method["name"] for method in methods] == list(available())
    text = printed(strategies_table())
    for name, method in available().items():
        for expected in (name, *method.Options.model_fields):
            assert expected in text
        assert joined(method.capabilities.exact) in joined(text)


def test_options_show_what_is_allowed_and_the_default() -> None:
    from fedpeft.strategies.base import AdapterStrategy, Capabilities, StrategyOptions

    class MethodOptions(StrategyOptions):
        solver: Literal["fast", "exact"] = Field("fast", description="how")
        tau: float | None = Field(None, gt=0, le=1, description="share kept")
        folds: int = Field(description="how many", ge=2)
        strict: bool = True

    class Method(AdapterStrategy):
        name: ClassVar[str] = "method"
        capabilities: ClassVar[Capabilities] = Capabilities("arXiv 1", "A", "never", True)
        Options = MethodOptions

    (described,) = strategies_dict({"method": Method})
    assert described["needs_single_factors"] is True
    options = {option.pop("name"): option for option in described["options"]}
    assert options["solver"] == {"default": "fast", "required": False, "allowed": "fast | exact", "description": "how"}
    assert options["tau"]["allowed"] == "number > 0, <= 1 or unset"
    assert options["folds"] == {
        "default": None,
        "required": True,
        "allowed": "whole number >= 2",
        "description": "how many",
    }
    text = joined(printed(strategies_table(strategies_dict({"method": Method}))))
    assert "fast | exact, default fast. how" in text
    assert "whole number >= 2, required. how many" in text
    assert "true or false, default true" in text


# --- presets, environment, scores


def test_presets_are_listed_with_what_they_need() -> None:
    presets: list[dict[str, Any]] = [
        {"name": "digits", "task": "image-classification", "description": "handwritten digits " * 5, "needs": None},
        {"name": "pairs", "task": "causal-lm", "description": "chat", "needs": "pip install 'fedpeft[text]'"},
    ]
    text = printed(presets_table(presets))
    for expected in ("digits", "image-classification", "causal-lm", "needs: pip install 'fedpeft[text]'"):
        assert expected in text
    assert text.count("needs") == 1


def test_the_environment_shows_versions_and_hardware() -> None:
    text = printed(environment_table({"python": "3.11.7", "cores": 2, "gpus": [], "packages": {"torch": "2.13.0"}}))
    assert [line.split() for line in text.splitlines()] == [
        ["python", "3.11.7"],
        ["cores", "2"],
        ["gpus", "none"],
        ["torch", "2.13.0"],
    ]


def test_scores_are_listed_by_domain_with_names_taken_literally() -> None:
    scores = {"run": "runs/first", "examples": 40, "loss": 0.5, "accuracy": 0.75, "macro_f1": 0.7}
    text = printed(scores_table({**scores, "domains": {"[bold]a": {"loss": 0.25, "accuracy": 0.875, "macro_f1": 0.8}}}))
    rows = [line.split() for line in text.splitlines()]
    assert ["accuracy", "macro_f1", "loss"] in rows
    assert ["all", "test", "rows", "0.7500", "0.7000", "0.5000"] in rows
    assert ["[bold]a", "0.8750", "0.8000", "0.2500"] in rows


# --- runs


def test_runs_are_listed_with_method_rounds_state_and_scores(
    run_directory: Maker, config: Config, events: Events
) -> None:
    run = run_directory(config(strategy__name="fedit", data__source="preset:digits"), events(4))
    run_directory(config(federation__rounds=9), events(2, reason="interrupted"), "second")
    run_directory(config(), events(1, reason="round 2: nobody answered"), "third")
    found = {facts["name"]: facts for facts in runs_list(run.parent)}
    assert json.loads(json.dumps(found)) == found
    assert found["first"] | {"started": None} == {
        "name": "first", "path": str(run), "state": "completed", "strategy": "fedit", "task": "sequence-classification",
        "preset": "digits", "rounds": 4, "planned": 4, "metric": "accuracy", "first": 0.25, "last": 0.75,
        "started": None, "problem": None,
    }  # fmt: skip
    assert {name: (facts["state"], facts["rounds"], facts["planned"]) for name, facts in found.items()} == {
        "first": ("completed", 4, 4), "second": ("interrupted", 2, 9), "third": ("stopped", 1, 4),
    }  # fmt: skip
    text = printed(runs_table(list(found.values()), run.parent))
    for expected in (
        "first",
        "fedit",
        "digits",
        "4/4",
        "completed",
        "0.2500 -> 0.7500",
        "accuracy",
        "2/9",
        "interrupted",
    ):
        assert expected in text


def test_a_run_without_an_end_is_running_until_it_has_been_silent_for_long(
    run_directory: Maker, config: Config, events: Events
) -> None:
    run = run_directory(config(), events(1, reason=None))
    written = (run / "metrics.jsonl").stat().st_mtime
    assert runs_list(run.parent, clock=lambda: written + 60)[0]["state"] == "running"
    assert runs_list(run.parent, clock=lambda: written + 1e5)[0]["state"] == "abandoned"


def test_foreign_folders_are_passed_over_and_broken_runs_are_listed_with_the_reason(
    run_directory: Maker, config: Config, events: Events
) -> None:
    folder = run_directory(config(), events(4)).parent
    (folder / "notes").mkdir()
    (folder / "file.txt").write_text("not a run")
    run_directory(config(), [], "empty")
    (run_directory(config(), [], "binary") / "metrics.jsonl").write_bytes(b"\xff\xfe")
    (run_directory(config(), [], "broken") / "config.toml").write_text("[model\n")
    (run_directory(config(), [], "old") / "config.toml").write_text("[model]\nshape = 3\n")
    (run_directory(config(), [], "odd") / "metrics.jsonl").write_text('5\n{"event": "round"}\n')
    found = {facts["name"]: facts for facts in runs_list(folder)}
    assert found.keys() == {"first", "empty", "binary", "broken", "old", "odd"}
    assert {name for name, facts in found.items() if facts["state"] == "unreadable"} == {"binary", "broken", "old"}
    assert "model.shape" in found["old"]["problem"]
    assert (found["empty"]["rounds"], found["empty"]["first"]) == (0, None)
    text = printed(runs_table(list(found.values()), folder))
    assert "unreadable" in text
    assert "0/4" in text


def test_runs_are_in_the_order_in_which_they_were_started(run_directory: Maker, config: Config) -> None:
    for name, started in (("b", 3000), ("a", 9000), ("c", 6000)):
        os.utime(run_directory(config(), [], name) / "config.toml", (started, started))
    folder = run_directory(config(), [], "d").parent
    assert [facts["name"] for facts in runs_list(folder)] == ["b", "c", "a", "d"]


def test_one_run_directory_lists_itself(run_directory: Maker, config: Config, events: Events) -> None:
    run = run_directory(config(), events(4))
    assert [facts["name"] for facts in runs_list(run)] == ["first"]


def test_no_runs_yet_is_no_error_but_a_folder_that_does_not_exist_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs_list(Path("runs")) == []
    assert "fedpeft simulate" in printed(runs_table([], Path("runs")))
    with pytest.raises(RunDirectoryError, match="rusn"):
        runs_list(Path("rusn"))


# --- partition


def test_a_partition_shows_rows_and_labels_of_each_client() -> None:
    clients = [
        {"client": "[b]0", "rows": 5, "labels": {"cat": 5, "dog": 0}, "domains": {"photo": 2, "sketch": 3}},
        {"client": "1", "rows": 12, "labels": {"cat": 2, "dog": 10}, "domains": {"photo": 12, "sketch": 0}},
    ]
    rows = [line.split() for line in printed(partition_view(clients)).splitlines()]
    for expected in (
        ["client", "rows", "cat", "dog"],
        ["[b]0", "5", "5", "."],
        ["1", "12", "2", "10"],
        ["client", "rows", "photo", "sketch"],
        ["1", "12", "12", "."],
    ):
        assert expected in rows
    assert "2 clients, 17 rows: 5 to 12 each, median 8.5" in printed(partition_view(clients))


def test_many_labels_and_many_clients_still_fit_80_columns() -> None:
    labels = {f"a label with a long name {index}": 200 + index for index in range(50)}
    clients = [{"client": f"site-{index}", "rows": 100, "labels": labels} for index in range(500)]
    text = printed(partition_view(clients))
    assert "site-19" in text
    assert "site-20" not in text
    assert "480 clients are not shown" in text
    assert "44 more labels" in joined(text)
    assert "500 clients, 50000 rows" in text


def test_clients_without_labels_show_their_rows() -> None:
    text = printed(partition_view([{"client": "a", "rows": 7}, {"client": "b", "rows": 9}]))
    assert ["a", "7"] in [line.split() for line in text.splitlines()]


# --- dry run


def planned(config: RunConfig, **facts: Any) -> DryRun:
    known: dict[str, Any] = {
        "parameters": 22_700_000, "trainable": 74_112, "layers": 12, "bytes_up": 296_448, "bytes_down": 300_000,
        "client_rows": {"a": 10, "b": 20, "c": 30, "d": 40}, "test_rows": 25, "paper": "arXiv 2411.14961",
        "exact": "closest", "needs_single_factors": True, "head_parameters": 384,
    }  # fmt: skip
    return DryRun(config=config, **(known | facts))


def test_a_dry_run_shows_what_would_be_trained_and_moved(config: Config) -> None:
    plan = planned(
        config(federation__rounds=10, federation__fraction=0.5, strategy__name="lora-fair", strategy__solver="cosine")
    )
    assert plan.cohort == 2
    assert plan.total_bytes == 10 * 2 * 596_448
    text = joined(printed(dry_run_table(plan)))
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
    assert words in joined(printed(dry_run_table(planned(config(adapter__head=head)))))
    without = planned(config(adapter__head=head, model__task="causal-lm"), head_parameters=0)
    assert "none: a causal language model" in joined(printed(dry_run_table(without)))
    assert without.to_dict()["head"] is None


def test_the_cohort_is_at_least_min_clients_and_at_most_all(config: Config) -> None:
    assert planned(config(federation__fraction=0.01)).cohort == 1
    assert planned(config(federation__fraction=0.01, federation__min_clients=3)).cohort == 3
    assert planned(config()).cohort == 4
