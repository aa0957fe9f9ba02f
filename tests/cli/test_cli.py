"""The command line: what it prints, and the one line that bad input gets."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from fedpeft.cli import main
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.runs import read_events
from fedpeft.strategies import find

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedpeft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process, in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *(str(word) for word in words)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return (code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def small(tiny_bert: Path, text_csv: Path) -> list[str]:
    """The words of a small run in this process."""
    return [
        f"model.name={tiny_bert}", f"data.source={text_csv}", "data.text=text", "data.label=label", "adapter.rank=2",
        "train.local_steps=2", "train.batch_size=4", "--workers", "0", "--rounds", "1",
    ]  # fmt: skip


def write_rows(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def refused(result: tuple[int, str, str]) -> str:
    """Check that input was refused as it should be; return the line."""
    code, _, err = result
    lines = err.strip().splitlines()
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_simulate_then_evaluate_then_list(fedpeft: Run, small: list[str], text_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "exactly" / "here"
    code, stdout, stderr = fedpeft("simulate", *small, "partition.by=client", "--strategy", "fedit", "--out", out)
    assert code == 0, stderr
    assert (out / "report.html").exists()
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["strategy"] == {"name": "fedit"}
    assert "accuracy" in stdout + stderr
    last = [event for event in read_events(out) if event["event"] == "evaluate"][-1]
    code, stdout, _ = fedpeft("evaluate", out, "--json")
    assert code == 0
    assert json.loads(stdout)["accuracy"] == last["accuracy"]
    code, stdout, _ = fedpeft("evaluate", out, f"data.test={text_csv}", "--json")
    assert json.loads(stdout)["examples"] == 120
    code, stdout, _ = fedpeft("runs", tmp_path / "exactly", "--json")
    assert [run["strategy"] for run in json.loads(stdout)] == ["fedit"]


def test_json_lines_are_the_events_and_nothing_else(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    code, stdout, _ = fedpeft("simulate", *small, "--clients", "3", "--out", tmp_path / "run", "--json")
    assert code == 0
    printed = [json.loads(line) for line in stdout.splitlines()]
    recorded = read_events(tmp_path / "run")
    assert [event for event in printed if event in recorded] == recorded


def test_a_file_is_overridden_by_words_and_words_by_options(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[strategy]\nname = 'lora-lego'\nrank = 3\n[train]\nlearning_rate = 0.5\n")
    words = ["my.toml", *small, "train.learning_rate=1e-3", "--clients", "2", "--seed", "7", "--adapter", "lora"]
    code, stdout, _ = fedpeft("simulate", *words, "--dry-run", "--json")
    assert code == 0
    planned = json.loads(stdout)
    assert planned["config"]["strategy"] == {"name": "lora-lego", "rank": 3, "reweight": "least-squares"}
    assert planned["config"]["train"]["learning_rate"] == 1e-3
    assert planned["config"]["run"]["seed"] == 7
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_what_a_run_then_moves(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    words = [*small, "--clients", "3", "--adapter", "ffa-lora"]
    _, stdout, _ = fedpeft("simulate", *words, "--dry-run", "--json")
    planned = json.loads(stdout)
    fedpeft("simulate", *words, "--out", tmp_path / "run")
    (moved,) = [event for event in read_events(tmp_path / "run") if event["event"] == "round"]
    assert (3 * planned["bytes_up_per_client"], 3 * planned["bytes_down_per_client"]) == (
        moved["bytes_up"],
        moved["bytes_down"],
    )
    assert planned["workers"]["workers"] == 0
    code, stdout, _ = fedpeft("simulate", *words, "--workers", "auto", "--dry-run")
    assert code == 0
    assert "lora-fair" in stdout
    assert " on Ray: " in stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian.x=1"], "Did you mean 'train'"),
        (["train.lr=1"], "Did you mean"),
        (["--strategy", "lora-fare", "--clients", "2"], "Did you mean 'lora-fair'"),
        (["--strategy", "fedit", "strategy.solver=cosine", "--clients", "2"], "has no option 'solver'"),
        (["--strategy", "lora-lego", "strategy.rank=3", "--adapter", "ffa-lora", "--clients", "2"], "keeps its rank 2"),
        (["--preset", "digit"], "Did you mean 'digits'"),
        (["nothing.toml"], "no configuration file 'nothing.toml'"),
        (["train.learning_rate=fast"], "train.learning_rate = 'fast'"),
        (["adapter.rank=0"], "adapter.rank = '0'"),
        (["adapter.rank=64", "--clients", "2"], "larger than layer"),
        (["adapter.targets=qeury", "--clients", "2"], "Did you mean 'query'"),
        (["--clients", "100"], "rows"),
        (["data.label=lable", "--clients", "2"], "lable"),
        (["data.source=nothing.csv", "--clients", "2"], "nothing.csv"),
        (["data.test=nothing.csv", "--clients", "2"], "nothing.csv"),
        (["model.name=./nothing", "--clients", "2"], "nothing"),
        (["partition.by=client", "--clients", "5"], "3"),
        (["federation.min_clients=4", "--clients", "2"], "federation.min_clients = 4"),
        ([], "federation.clients"),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_written(
    words: list[str], says: str, fedpeft: Run, small: list[str], tmp_path: Path
) -> None:
    given = [] if "--preset" in words else small
    line = refused(fedpeft("simulate", *given, *words, "--out", tmp_path / "run"))
    assert says in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "empty"),
        ([["text", "label"]], "no rows"),
        ([["text", "label"], ["w1", "a"], ["w2", "a"], ["w3", "a"]], "label"),
        ([["text", "label"], ["w1", "a"], ["", "b"], ["w3", "a"]], "row 2"),
        ([["words", "label"], ["w1", "a"], ["w2", "b"]], "text"),
    ],
)
def test_bad_rows_are_named(rows: list[list[str]], says: str, fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.csv", rows)
    line = refused(fedpeft("simulate", *small, f"data.source={source}", "--clients", "2", "--out", tmp_path / "run"))
    assert "rows.csv" in line
    assert says in line


def test_a_model_folder_needs_safetensors(fedpeft: Run, small: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    words = ["simulate", *small, f"model.name={folder}", "--clients", "2"]
    assert "no config.json" in refused(fedpeft(*words))
    (folder / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    assert "no weights at all" in refused(fedpeft(*words))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pytorch_model.bin, which can run code" in refused(fedpeft(*words))
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    assert "cannot load" in refused(fedpeft(*words))


def test_a_hub_id_without_network_is_one_line(fedpeft: Run, small: list[str]) -> None:
    line = refused(fedpeft("simulate", *small, "model.name=some-owner/some-model", "--clients", "2"))
    assert "some-owner/some-model" in line


def test_a_run_is_not_overwritten(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert fedpeft("simulate", *small, "--clients", "2", "--out", out)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "already holds a run" in refused(fedpeft("simulate", *small, "--clients", "2", "--out", out))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_complete_run_says_so_and_goes_on_with_more_rounds(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    assert fedpeft("simulate", *small, "--clients", "3", "--out", "run")[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, out, err = fedpeft("simulate", "--resume", "run")
    assert (code, err) == (0, "")
    assert out.startswith("'run' is complete, all 1 rounds; more: federation.rounds=2")
    (tmp_path / "run" / "report.html").unlink()
    code, out, err = fedpeft("simulate", "--resume", "run", "--json")
    assert (code, err, json.loads(out)["event"]) == (0, "", "note")
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    code, out, err = fedpeft("simulate", "--resume", "run", "federation.rounds=2")
    assert code == 0
    assert "note: the run goes on after round 1" in err
    assert [line.split()[1] for line in out.splitlines() if line.startswith("round ")] == ["2/2"]
    assert "(round 0 -> 2)" in out  # what was before is known, and not shown again
    (listed,) = json.loads(fedpeft("runs", "--json", tmp_path)[1])
    assert (listed["state"], listed["rounds"], listed["planned"], listed["resumable"]) == ("completed", 2, 2, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--resume", "nowhere"], "error: 'nowhere' is no run directory: it holds no config.toml."),
        (
            ["--resume", "run", "--out", "other"],
            "error: --out does not go with --resume, which goes on with the run in",
        ),
        (["--resume", "run", "--dry-run"], "error: --dry-run does not go with --resume"),
        (["--resume", "run", "--seed", "9"], "error: run.seed = 9 cannot be changed in a run that goes on: it has 0."),
        (["--resume", "run", "--rounds", "1"], "error: federation.rounds = 1, but the run has 2; give as many or more"),
    ],
)
def test_what_does_not_go_with_a_resumption_gets_one_line(
    words: list[str], says: str, fedpeft: Run, text_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(text_config().to_toml())
    (tmp_path / "run" / "environment.json").write_text('{"simulated": true}')
    code, out, err = fedpeft("simulate", *words)
    assert (code, out) == (2, "")
    assert err.startswith(says)
    assert err.count("\n") == 1


def test_evaluate_refuses_what_would_change_the_model(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    assert "is no run directory" in refused(fedpeft("evaluate", tmp_path))
    fedpeft("simulate", *small, "--clients", "2", "--out", tmp_path / "run")
    assert "cannot be changed" in refused(fedpeft("evaluate", tmp_path / "run", "adapter.rank=3"))


def test_partition_shows_who_holds_what(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    words = [word for word in small if "=" in word]
    code, stdout, _ = fedpeft("partition", *words, "partition.by=client", "--plot", tmp_path / "who.png")
    assert code == 0
    assert "site-2" in stdout
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")
    code, stdout, _ = fedpeft("partition", *words, "partition.by=client", "--json")
    json.loads(stdout)


@pytest.mark.parametrize("command", ["strategies", "presets", "env", "runs"])
def test_tables_have_a_json_form(command: str, fedpeft: Run) -> None:
    code, stdout, _ = fedpeft(command)
    assert code == 0
    assert stdout.strip()
    code, stdout, _ = fedpeft(command, "--json")
    assert code == 0
    json.loads(stdout)


def test_help_needs_no_heavy_library() -> None:
    """What answers at once cannot have imported torch."""
    asked = "import sys; sys.argv = ['fedpeft', '--help']\nfrom fedpeft.cli import main\n"
    asked += "try: main()\nexcept SystemExit: pass\n"
    asked += "print([m for m in ('torch', 'transformers', 'ray', 'flwr', 'peft', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "simulate" in done.stdout


def test_a_strategy_that_is_none_is_refused_before_torch_is_imported() -> None:
    asked = "import sys; sys.argv = ['fedpeft', 'simulate', '--strategy', 'lora-fiar']\nfrom fedpeft.cli import main\n"
    asked += "try: main()\nexcept SystemExit as end: print(end.code)\n"
    asked += "print([m for m in ('torch', 'transformers', 'ray', 'flwr', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-2:] == ["2", "[]"]
    with pytest.raises(ConfigError) as registry:
        find("lora-fiar")
    assert str(registry.value) in done.stderr


def test_adapters_of_two_runs_are_merged(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    for seed in (1, 2):
        fedpeft("simulate", *small, "--clients", "2", "--seed", seed, "--out", tmp_path / f"run-{seed}")
    words = [tmp_path / "run-1" / "adapter", tmp_path / "run-2" / "adapter", "--weights", "1,0.5"]
    code, stdout, err = fedpeft("merge", "--method", "flora", *words, "--out", tmp_path / "merged")
    assert code == 0, err
    assert "exact up to rounding" in stdout
    assert json.loads((tmp_path / "merged" / "labels.json").read_text()) == ["no", "yes"]
    words += ["--method", "lora-lego", "--rank", "3", "--option", "reweight=none", "--out", tmp_path / "other"]
    code, stdout, err = fedpeft("merge", *words, "--json")
    assert code == 0, err
    facts = json.loads(stdout)
    assert facts["ranks"] == [3]
    assert facts["options"] == {"reweight": "none"}
    assert "not of the form key=value" in refused(fedpeft("merge", *words, "--option", "reweight"))
    assert "not an empty folder" in refused(fedpeft("merge", *words))
    assert "no adapter_config.json; do you mean" in refused(
        fedpeft("merge", "--method", "fedit", tmp_path / "run-1", "--out", tmp_path / "third")
    )


def test_methods_are_compared(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    words = ["compare", "local", "fedit:server_optimizer=adam", *small, "--clients", "2", "--out", tmp_path / "all"]
    code, stdout, err = fedpeft(*words)
    assert code == 0, err
    assert "run 2/2  fedit:server_optimizer=adam  seed 0" in err
    assert "server_optimizer=adam" in stdout
    assert "the lower bound" in " ".join(stdout.split())
    code, stdout, err = fedpeft(*words, "--json")
    assert err.count("done before") == 2
    assert [row["method"] for row in json.loads(stdout)["rows"]] == ["local", "fedit:server_optimizer=adam"]
    assert "Did you mean 'fedit'" in refused(fedpeft("compare", "local", "fedti", *small))


def test_a_private_dry_run_plans_what_the_run_then_spends(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    words = [*small, "partition.by=client", "privacy.level=record", "privacy.epsilon=8"]
    code, stdout, err = fedpeft("simulate", *words, "--dry-run", "--json")
    assert code == 0, err
    planned = json.loads(stdout)["privacy"]
    assert (planned["level"], planned["rng"], planned["guarantee"]) == ("record", "seeded", False)
    code, stdout, err = fedpeft("simulate", *words, "--out", tmp_path / "run")
    assert code == 0, err
    stated = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert planned["epsilon_max"] == stated["epsilon_max"] <= 8
    assert planned["steps"] == [2, 2]
    assert "no guarantee: seeded" in stdout
    assert stated["statement"] in " ".join(stdout.split())
    code, stdout, _ = fedpeft("simulate", *words, "--dry-run")
    assert "calibrated to epsilon 8" in stdout
    line = refused(fedpeft("simulate", *words, "privacy.epsilon=1e-9", "--dry-run"))
    assert "no noise multiplier" in line


def test_a_ledger_shows_who_spent_what(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    words = [*small, "partition.by=client", "privacy.level=record", "privacy.noise_multiplier=1"]
    fedpeft("simulate", *words, "--out", tmp_path / "run")
    code, stdout, err = fedpeft("privacy", "ledger", tmp_path / "run")
    assert code == 0, err
    assert "site-2" in stdout
    assert "Neighbours: add or remove one row of one client" in " ".join(stdout.split())
    code, stdout, _ = fedpeft("privacy", "ledger", tmp_path / "run", "--json")
    facts = json.loads(stdout)
    assert facts["epsilon_max"] == json.loads((tmp_path / "run" / "privacy.json").read_text())["epsilon_max"]
    assert [each["messages"] for each in facts["clients"]] == [1, 1, 1]
    (tmp_path / "run" / "ledger.jsonl").rename(tmp_path / "site.jsonl")
    code, stdout, _ = fedpeft("privacy", "ledger", tmp_path / "site.jsonl", "--delta", "1e-6", "--json")
    assert [each["run"] for each in json.loads(stdout)["runs"]] == ["run"]
    assert "no run directory" in refused(fedpeft("privacy", "ledger", tmp_path / "nothing"))
    assert "for a site's ledger" in refused(fedpeft("privacy", "ledger", tmp_path / "run", "--delta", "1e-6"))
    assert "there is no accountant 'gdp'" in refused(
        fedpeft("privacy", "ledger", tmp_path / "site.jsonl", "--accountant", "gdp")
    )


def test_budgets_are_swept(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    words = ["privacy", "sweep", *small, "--clients", "2", "--strategies", "fedit", "--out", tmp_path / "all"]
    code, stdout, err = fedpeft(*words, "--epsilons", "8,inf", "--adapters", "ffa-lora")
    assert code == 0, err
    assert "run 2/2  ffa-lora_fedit_epsilon=8  seed 0" in err
    assert "budget 8" in stdout
    assert "epsilon 8.000" in stdout or "epsilon 7.99" in stdout
    assert (tmp_path / "all" / "sweep.png").exists()
    code, stdout, err = fedpeft(*words, "--epsilons", "8,inf", "--adapters", "ffa-lora", "--json")
    assert err.count("done before") == 2
    assert json.loads(stdout)["budgets"] == [8.0, None]
    assert "'dora' is not for" in refused(fedpeft(*words, "--epsilons", "8", "--adapters", "lora,dora"))
    assert "--level site does not exist" in refused(fedpeft(*words, "--level", "site"))


def test_the_version_is_printed_and_the_package_can_be_run(fedpeft: Run) -> None:
    assert fedpeft("--version") == (0, f"fedpeft {version('fedpeft')}\n", "")
    done = subprocess.run([sys.executable, "-m", "fedpeft", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fedpeft {version('fedpeft')}\n"


def test_a_printed_configuration_is_simulated(fedpeft: Run, small: list[str], tmp_path: Path) -> None:
    words = [*small, "--clients", "2", "--strategy", "lora-lego", "strategy.rank=2"]
    code, stdout, err = fedpeft("config", *words)
    assert code == 0, err
    (tmp_path / "my.toml").write_text(stdout)
    _, planned, _ = fedpeft("simulate", *words, "--dry-run", "--json")
    _, again, err = fedpeft("simulate", "my.toml", "--dry-run", "--json")
    assert json.loads(again) == json.loads(planned), err
    assert "Did you mean 'lora-fair'" in refused(fedpeft("config", "--strategy", "lora-fare"))
