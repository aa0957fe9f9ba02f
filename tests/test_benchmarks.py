"""The benchmarks run, on sizes whose figures mean nothing."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    aggregation,
    audit,
    batched,
    cohorts,
    draw,
    engine,
    language_models,
    lora_fair_lambda,
    memory,
    mixed_ranks,
    peer,
    pfl_peer,
    prefix,
    scaling,
    startup,
    step,
)
from benchmarks import all as everything
from benchmarks import loop as bare_loop
from benchmarks.job import Simulated
from benchmarks.peer_app import task
from benchmarks.record import Figure, Peak, high_water, in_turns, machine, parser, publish, ratio, read

ROOT = Path(__file__).resolve().parents[1]


def test_each_benchmark_says_the_command_that_runs_it_and_pages_name_no_other() -> None:
    files = [path for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text(encoding="utf-8")]
    assert all(f"python -m benchmarks.{path.stem}" in path.read_text(encoding="utf-8") for path in files)
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert set(re.findall(r"python -m benchmarks\.(\w+)", pages)) <= {path.stem for path in files}
    assert "python benchmarks/" not in pages


def test_a_benchmark_that_uses_another_one_starts_as_a_module() -> None:
    command = [sys.executable, "-m", "benchmarks.regimes", "--help"]
    assert "--only" in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_aggregation_benchmark_has_all_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figures.json"
    aggregation.main(["--quick", "--json", str(written)])
    shown = capsys.readouterr().out
    assert "threads" in shown
    rows = json.loads(written.read_text())["rows"]
    for start in (
        *("lora-fair, times", "lora-fair, B against", "flexlora, times", "flexlora randomized, times"),
        *("flexlora randomized, clients alike", "flexlora randomized, clients that share nothing"),
        *("lora-lego, clients alike: time", "lora-lego, clients that share nothing: time"),
        *(f"{name}, extra memory" for name in aggregation.SINGLE_FACTORS),
        "fedit, streamed",
        *(f"{name}, log-log slope of time over {axis}" for name in aggregation.METHODS for axis in ("clients", "rank")),
    ):
        assert any(row["what"].startswith(start) for row in rows), start
    agreed = [row for row in rows if row["what"].startswith("lora-fair, B against")]
    assert all(row["passed"] for row in agreed)
    above = [row["value"] for row in rows if row["what"].startswith("flexlora, clients alike: |DW - sent|")]
    assert all(abs(value) < 1e-4 for value in above)


def test_growth_is_a_slope_on_logarithmic_axes() -> None:
    assert aggregation.slope([10, 20, 50], [1.0, 4.0, 25.0]) == pytest.approx(2.0)


def test_what_a_kept_prefix_can_save_is_bounded_by_its_products() -> None:
    assert prefix.limit(2, 6, trains=False) == 3.0
    assert prefix.limit(2, 6, trains=True) == pytest.approx((6 + 1.75) / (2 + 1.75))


def test_the_audit_benchmark_has_a_row_for_a_run() -> None:
    small = {"federation.rounds": 1, "run.evaluate_every": 1, "train.local_steps": 2, "privacy.canaries": 50}
    found = audit.audited({**audit.SETTINGS, **audit.CASES["no noise, no clipping"], **small})
    assert found["canaries"] == 50
    header, _, row = audit.table([{**found, "case": "no noise"}]).splitlines()
    assert row.startswith("| no noise | none | 0.000 |")
    assert header.count("|") == row.count("|")


def test_mixed_ranks_collapse_with_flexlora_and_not_with_raflora(monkeypatch: pytest.MonkeyPatch) -> None:
    flex, ra = (mixed_ranks.learn(name, 0, 12) for name in ("flexlora", "raflora"))
    assert flex.beyond < 0.5 < 0.7 < ra.beyond < 0.8  # 0.75 of the target
    assert ra.missed < 0.2 < flex.missed
    monkeypatch.setattr(mixed_ranks, "METHODS", ["hetlora"])
    rows = mixed_ranks.table(1, 1, lambda _: None).splitlines()
    assert rows[2] == "| the target | 0.75 | 0 |"
    assert [row.split(" | ")[0] for row in rows[3:]] == ["| hetlora", "| florist:padding=true,threshold=0.99"]


def test_the_low_rank_regression_has_a_cell_for_each_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_fair_lambda, "ROUNDS", 2)
    cells = lora_fair_lambda.regression(1).strip("| ").split(" | ")
    header = lora_fair_lambda.table([]).splitlines()[0].strip("| ").split(" | ")
    assert len(cells) == len(header)
    fedit, nearest = map(float, cells[-2:])
    assert 0 < nearest <= fedit < 1


# --- the engine's record ---------------------------------------------------------------------------------------------


BESIDE_OTHERS = (peer, bare_loop, scaling, engine, cohorts, startup)
PARTS = (
    step,
    memory,
    prefix,
    batched,
    language_models,
)  # kills forks, which wants a process of its own: tests/end_to_end/test_kills.py
NAMES = [module.__name__.rpartition(".")[2] for module in (*BESIDE_OTHERS, *PARTS)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of quick runs of all that measure the engine, in this process."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    for module, name in zip((*BESIDE_OTHERS, *PARTS), NAMES, strict=True):
        module.main(["--quick", "--json", str(folder / f"{name}.json")])
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_of_the_engine_writes_its_figures_and_the_machine(results: Path, name: str) -> None:
    kept = read(results / f"{name}.json")
    assert kept["command"] == f"python -m benchmarks.{name}"
    assert kept["machine"]["cores"] >= 1
    assert kept["machine"]["packages"]["torch"]
    assert kept["figures"]
    # a difference of accuracies alone may be none
    assert all(figure.value > 0 for figure in kept["figures"] if figure.unit)


def test_the_application_without_fedpeft_does_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = peer.settings(peer.small(tmp_path), "pooler", rounds=1)
    assert sorted(row for rows in given["partitions"] for row in rows) == list(range(24))
    (tmp_path / "settings.json").write_text(json.dumps(given))
    monkeypatch.setenv(task.VARIABLE, str(tmp_path / "settings.json"))
    task.settings.cache_clear()
    task.load_rows.cache_clear()
    inputs, mask, labels = task.load_rows(0).tensors
    assert inputs.shape == mask.shape == (12, 16), "padded to a fixed length"
    home = peer.small(tmp_path / "again").home()
    assert labels.tolist() == home.data.train.take(home.partition.indices[0]).labels.tolist()
    trained = {name for name, p in task.load_model().named_parameters() if p.requires_grad}
    assert {"lora_A", "lora_B", "classifier", "pooler"} == {
        part for name in trained for part in name.split(".") if part in ("lora_A", "lora_B", "classifier", "pooler")
    }
    imports = "".join(path.read_text() for path in (ROOT / "benchmarks" / "peer_app").glob("*.py"))
    assert "import fedpeft" not in imports
    assert "from fedpeft" not in imports


def test_a_job_of_fewer_rounds_lasts_until_its_last_score_and_what_comes_after_all() -> None:
    events = [
        {"event": "evaluate", "round": number, "accuracy": number / 10, "at": 10.0 * number} for number in range(4)
    ]
    run = Simulated(wall=35.0, events=events, peak=1, driver=1)
    assert run.whole(2) == 25.0
    assert peer.first_at(run, 0.2) == 20.0
    assert peer.first_at(run, 0.9) is None


def test_without_pfl_its_benchmark_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pfl_peer.main(["--quick", "--python", sys.executable, "--json", str(tmp_path / "pfl.json")])
    if not pfl_peer.has_pfl(sys.executable):
        assert "no pfl" in capsys.readouterr().err
        assert read(tmp_path / "pfl.json")["figures"] == []


def test_figures_say_whether_their_target_is_reached(tmp_path: Path) -> None:
    assert Figure("faster", 1.7, target=1.6).met is True
    assert Figure("memory", 1.3, "x", 1.2, "most").met is False
    assert Figure("to read", 1.0).met is None
    given = parser(None).parse_args(["--json", str(tmp_path / "a.json")])
    publish("a", [Figure("faster", 1.7, target=1.6, detail={"s": 2.0})], given, machine(), points=[1])
    kept = read(tmp_path / "a.json")
    assert kept["figures"] == [Figure("faster", 1.7, target=1.6, detail={"s": 2.0})]
    assert kept["points"] == [1]
    assert everything.rows(tmp_path) == {}, "it is none of the record"


def test_a_result_names_the_options_that_its_figures_depend_on(tmp_path: Path) -> None:
    made = parser(None)
    made.add_argument("--local-steps", type=int, nargs="+", default=[1])
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("settings", nargs="*")
    given = made.parse_args(["a.b=1", "--local-steps", "2", "4", "--turns", "3", "--json", str(tmp_path / "a.json")])
    publish("a", [], given, machine())
    assert read(tmp_path / "a.json")["command"] == "python -m benchmarks.a --local-steps 2 4 a.b=1"


def test_the_record_is_smaller_than_each_benchmark_by_itself_unless_it_shall_be_full() -> None:
    given = argparse.Namespace(quick=False, full=False, kills=None)
    assert everything.options_of("kills", given) == ["--kills", "5"]
    given.full = True
    assert everything.options_of("kills", given) == everything.options_of("peer", given) == []
    given.kills = 7
    assert everything.options_of("kills", given) == ["--kills", "7"]


def test_contenders_take_turns_and_memory_is_that_of_the_whole_tree() -> None:
    order: list[str] = []
    taken = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["b", "a", "a", "b"]
    assert len(taken["a"]) == 2
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0
    hold = "import sys; held = bytearray(80_000_000); print('held', flush=True); sys.stdin.read()"
    nest = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", nest], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with Peak(process.pid) as memory:
            memory.look()
        process.stdin.close()
    assert memory.highest > 80_000_000 > memory.own > 0
    assert high_water(process.pid) == 0, "it is gone"


def test_the_drawing_and_the_tables_are_made_of_the_results(results: Path, tmp_path: Path) -> None:
    out, document = tmp_path / "performance.svg", tmp_path / "page.md"
    assert draw.draw(results, out) == ["peer", "scaling", "engine", "engine", "cohorts"]
    assert "<svg" in out.read_text(encoding="utf-8")
    document.write_text(
        "before\n<!-- drawing -->\n<!-- end of drawing -->\n<!-- startup -->\n<!-- end of startup -->\nafter\n"
    )
    draw.write_tables(results, document)
    text = document.read_text()
    assert "](performance.svg)" in text
    assert "| tiny: start to first trained client |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    there = [name for name in everything.present(list(everything.RECORD)) if f"<!-- {name} -->" in page]
    assert there == everything.present(list(everything.RECORD)), "each benchmark of the record has its table"


def test_a_steps_products_are_recorded_forward_and_backward() -> None:
    layer, x = torch.nn.Linear(6, 4), torch.randn(3, 6, requires_grad=True)
    with step.Recorder() as recorder:
        torch.tanh(layer(x)).sum().backward()
    names = sorted(operation.name().rpartition("::")[2] for operation, *_ in recorder.products)
    assert names == ["addmm", "mm", "mm"]
    for operation, arguments, settings in recorder.products:
        operation(*arguments, **settings)
