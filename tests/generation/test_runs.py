"""A lookup table that a federation teaches a small Llama, and what becomes of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from fedpeft.cli import main
from fedpeft.config import RunConfig, merge, nest, resolve
from fedpeft.errors import ConfigError, RunDirectoryError
from fedpeft.exporting import card, export_adapter, export_merged
from fedpeft.finished import open_run
from fedpeft.privacy.overlap import InTheClear
from fedpeft.rescoring import rescore
from fedpeft.runs import read_events
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies.rounds import samples
from tests.generation.conftest import TASK


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


def row(table: Path, index: int) -> dict[str, str]:
    return dict(json.loads(table.read_text().splitlines()[index]))


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["fedpeft", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_federation_teaches_a_base_a_table_until_every_answer_matches(taught: Path) -> None:
    first, last = events(taught, "evaluate")
    assert (first["exact_match"], last["exact_match"]) == (0.0, 1.0)
    assert last["f1"] == 1.0
    assert last["clients"]["exact_match"] == {"mean": 1.0, "worst_tenth": 1.0}
    assert {each["exact_match"] for each in last["clients"]["scores"].values()} == {1.0}


def test_samples_show_a_row_with_the_answers_before_and_after(taught: Path, table_jsonl: Path) -> None:
    (event,) = events(taught, "samples")
    rows = {json.loads(line)["prompt"]: json.loads(line) for line in table_jsonl.read_text().splitlines()}
    assert len(event["samples"]) == 3
    for sample in event["samples"]:
        known = rows[sample["prompt"]]
        assert (sample["client"], sample["reference"]) == (known["site"], known["completion"])
        assert sample["after"] == known["completion"] != sample["before"]
    kinds = [each["event"] for each in read_events(taught)]
    assert kinds.index("samples") == len(kinds) - 2
    page = (taught / "report.html").read_text()
    assert "<h2>Samples</h2>" in page
    assert f"<td>{event['samples'][0]['before']}</td>" in page


def test_the_terminal_shows_scores_of_answers_and_samples(table_config: RunConfig, taught: Path) -> None:
    from io import StringIO

    from fedpeft.report.console import RunConsole
    from fedpeft.report.terminal import TerminalListener

    out = StringIO()
    console = RunConsole(file=out, force_interactive=False, width=120)
    with TerminalListener(table_config, out=console, progress=RunConsole(file=StringIO())) as listener:
        for event in read_events(taught):
            listener(event)
        listener.finish(taught)
    said = out.getvalue()
    assert "exact_match 1.0" in said
    assert "sample answers:" in said
    sample = events(taught, "samples")[0]["samples"][0]
    assert f"after     {sample['after']}" in said


def test_what_a_row_says_is_text_in_the_page_and_no_markup(taught: Path, table_config: RunConfig) -> None:
    from fedpeft.report.page import render
    from fedpeft.runs.history import History

    history = History.read(taught)
    history.samples = {"round": 7, "samples": [{"prompt": "<script>alert(1)</script>", "after": "[bold]&"}]}
    page = render(taught, table_config, history)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_finished_run_is_judged_anew_by_other_metrics_and_on_fewer_rows(taught: Path) -> None:
    scores = rescore(taught, {"data": {"metric": "rouge,bleu,choice_accuracy"}, "run": {"generate_rows": 5}})
    # two words are no four-gram: BLEU of answers so short is smoothed, and zero
    assert (scores["rouge"], scores["choice_accuracy"], scores["examples"]) == (1.0, 1.0, 24)
    assert "exact_match" not in scores
    with pytest.raises(ConfigError, match=r"'data\.max_length' cannot be changed"):
        rescore(taught, {"data": {"max_length": 3}})


def test_generate_answers_prompts_of_options_and_of_stdin(
    taught: Path, table_jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from io import StringIO

    first, second = row(table_jsonl, 0), row(table_jsonl, 1)
    words = ("generate", taught, "--prompt", first["prompt"], "--compare", "base", "--json")
    assert run_command(monkeypatch, *words) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["prompt"], said["answer"]) == (first["prompt"], first["completion"])
    assert said["base"] != said["answer"]
    monkeypatch.setattr("sys.stdin", StringIO(f"{first['prompt']}\n\n{second['prompt']}\n"))
    assert run_command(monkeypatch, "generate", taught, "--max-new-tokens", "1") == 0
    out = capsys.readouterr().out
    assert f"prompt:  {second['prompt']}\nanswer:  {second['completion'].split()[0]}\n" in out


def test_a_file_gives_a_prompt_a_line_whatever_else_divides_lines_elsewhere(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffw1\x0cw2\r\n\nw3\u2028w4".encode())
    assert run_command(monkeypatch, "generate", taught, "--file", file, "--json", "--max-new-tokens", 1) == 0
    said = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert said == ["w1\x0cw2", "w3\u2028w4"]
    file.write_text(" \n")
    assert run_command(monkeypatch, "generate", taught, "--file", file) == 2
    assert "has no line with a prompt" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_is_no_text_on_stdin_is_refused(
    taught: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from io import BytesIO, TextIOWrapper

    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"w1 \xff\n"), encoding="utf-8"))
    assert run_command(monkeypatch, command, taught) == 2
    assert capsys.readouterr().err == "error: what comes on stdin is no text in utf-8; give UTF-8, or --file FILE.\n"


@pytest.mark.parametrize(
    "words", [("generate", "--prompt", "w1"), ("generate", "--prompt", "w1", "--compare", "base"), ("chat",)]
)
def test_an_answer_does_not_steer_the_terminal(
    taught: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from io import StringIO

    monkeypatch.setattr("fedpeft.generation.generate", lambda *settings: ["\x1b]0;own\x07\nred"])
    monkeypatch.setattr("sys.stdin", StringIO("w1\n"))
    assert run_command(monkeypatch, words[0], taught, *words[1:]) == 0
    assert "\\x1b]0;own\\x07\nred\n" in capsys.readouterr().out


def test_a_talk_forgets_its_oldest_exchange_and_never_the_system_or_the_question() -> None:
    from fedpeft.cli.generate import _forgets

    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    history = [{"role": role, "content": str(at)} for at, role in enumerate(roles)]
    assert _forgets(history)
    assert [turn["content"] for turn in history] == ["0", "3", "4", "5"]
    assert _forgets(history)
    assert not _forgets(history)
    assert [turn["content"] for turn in history] == ["0", "5"]


def test_chat_answers_line_by_line_until_it_is_told_to_quit(
    taught: Path, table_jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from io import StringIO

    first, second = row(table_jsonl, 3), row(table_jsonl, 4)
    monkeypatch.setattr("sys.stdin", StringIO(f"{first['prompt']}\n/reset\n{second['prompt']}\n/quit\nw1\n"))
    assert run_command(monkeypatch, "chat", taught) == 0
    assert capsys.readouterr().out.splitlines() == [first["completion"], second["completion"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "RUN", "--prompt", "w1", "--compare", "other"], "give base"),
        (["generate", "RUN", "--prompt", "w1", "--client", "s1"], "Its clients share one model"),
        (["generate", "RUN", "--file", "nowhere.txt"], "'nowhere.txt' cannot be read"),
        (["export", "RUN", "--out", "x"], "--merged"),
        (["export", "RUN", "--out", "x", "--adapter", "--dtype", "float16"], "--dtype goes with --merged"),
        (["export", "RUN", "--out", "x", "--merged", "--dtype", "int4"], "float32, bfloat16, float16"),
        (["export", "RUN", "--out", "RUN", "--merged"], "already holds a run"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    taught: Path,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(monkeypatch, *[taught if word == "RUN" else word for word in words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("x").exists()


def test_a_merged_folder_needs_transformers_alone_and_loses_what_the_run_did(
    taught: Path, table_jsonl: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedpeft.training.evaluation import score

    out = tmp_path / "model"
    export_merged(taught, out)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out).eval()
    run = open_run(taught)
    assert score(model, run.home.test, run.config).metrics()["loss"] == pytest.approx(
        events(taught, "evaluate")[-1]["loss"], abs=1e-5
    )
    assert model.config.use_cache
    assert model.generation_config.eos_token_id in (2, [2])
    known = row(table_jsonl, 5)
    ids = tokenizer(known["prompt"], return_tensors="pt")["input_ids"]
    said = model.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=4)[0, ids.shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True).strip() == known["completion"]
    assert (out / "README.md").read_text().startswith("---\nlibrary_name:")
    with pytest.raises(RunDirectoryError, match="is not an empty folder"):
        export_merged(taught, out)


def test_half_precision_is_rounded_once_on_export(taught: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_merged(taught, tmp_path / "half", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_an_exported_adapter_has_a_card_with_scores_and_no_row(taught: Path, table_jsonl: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    out = tmp_path / "adapter"
    export_adapter(taught, out)
    text = (out / "README.md").read_text()
    assert "- Method: fedit" in text
    assert "| exact_match | 0 | 1 |" in text.replace("0.0000", "0").replace("1.0000", "1")
    assert "without differential privacy" in text
    assert str(table_jsonl) not in text
    assert not any(json.loads(line)["completion"] in text for line in table_jsonl.read_text().splitlines())
    assert AutoPeftModelForCausalLM.from_pretrained(out) is not None
    assert not list(tmp_path.glob(".adapter*"))


def test_personal_models_are_asked_for_by_their_client(table_config: RunConfig, tmp_path: Path) -> None:
    settings = {"strategy": {"name": "fedsa-lora"}, "federation": {"rounds": 1}, "run": {"evaluate_every": 1}}
    config = resolve([merge([table_config.model_dump(exclude_none=True), settings])])
    simulate(config, tmp_path / "run")
    assert "exact_match" in events(tmp_path / "run", "evaluate")[-1]
    run = open_run(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="whose by --client: s0, s1, s2"):
        run.folder()
    assert run.folder("s1").parent.name == "s1"
    assert "the client s1" in card(run, "s1", merged=False)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_private_run_withholds_answers_to_rows_that_it_protects(
    table_config: RunConfig, tmp_path: Path, held_out: bool
) -> None:
    settings: dict[str, Any] = {
        "federation": {"rounds": 1},
        "run": {"generate": 1, "evaluate_clients": False, "evaluate_every": 1},
        "train": {"local_steps": 1},
        "privacy": {"level": "record", "epsilon": 50.0},
    }
    table = table_config.model_dump(exclude_none=True)
    if held_out:
        table["data"].pop("test")  # else it is the clients' own file
    simulate(resolve([merge([table, settings])]), tmp_path / "run")
    (event,) = events(tmp_path / "run", "samples")
    assert event["samples"] == []
    assert "give data.test with rows that may be public" in event["withheld"]
    assert "exact_match" in events(tmp_path / "run", "evaluate")[-1]
    assert "are not told" in card(open_run(tmp_path / "run"), None, merged=False)


def test_a_run_that_ends_early_is_judged_at_its_end_and_shows_turns_by_their_marks(
    table_config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "turns.jinja").write_text("{% for turn in messages %}{{ turn['content'] }} [EOS] {% endfor %}")
    settings: dict[str, Any] = {
        "data": {"template": str(tmp_path / "turns.jinja")},
        "federation": {"rounds": 5},
        "run": {"generate": 1, "evaluate_clients": False, "evaluate_every": 1, "patience": 2},
        "train": {"local_steps": 1, "learning_rate": 1e-12},
    }
    simulate(resolve([merge([table_config.model_dump(exclude_none=True), settings])]), tmp_path / "run")
    judged = {event["round"]: "exact_match" in event for event in events(tmp_path / "run", "evaluate")}
    assert judged == {0: True, 1: False, 2: True}
    (event,) = events(tmp_path / "run", "samples")
    assert event["samples"][0]["prompt"].endswith("[EOS]")


def test_a_run_whose_budget_is_spent_is_judged_at_its_end(table_config: RunConfig, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "federation": {"rounds": 5},
        "run": {"generate": 0, "evaluate_clients": False, "evaluate_every": 5, "max_megabytes": 0.4},
        "train": {"local_steps": 1},
    }
    simulate(resolve([merge([table_config.model_dump(exclude_none=True), settings])]), tmp_path / "run")
    judged = [(event["round"], "exact_match" in event) for event in events(tmp_path / "run", "evaluate")]
    assert len(judged) == 2
    assert 0 < judged[1][0] < 5
    assert judged[1][1]


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix-tuning"])
def test_a_run_of_virtual_tokens_is_scored_anew_and_by_lm_eval(
    table_config: RunConfig, table_jsonl: Path, tmp_path: Path, kind: str
) -> None:
    from fedpeft.generation import answer
    from fedpeft.harness import evaluate_tasks

    settings: dict[str, Any] = {
        "adapter": {"kind": kind, "num_virtual_tokens": 3},
        "data": {"max_length": 64},
        "federation": {"rounds": 1},
        "run": {"generate": 0, "evaluate_every": 1},
        "train": {"local_steps": 1},
    }
    table = table_config.model_dump(exclude_none=True)
    for key in ("rank", "alpha", "targets"):
        table["adapter"].pop(key)
    simulate(resolve([merge([table, settings])]), tmp_path / "run")
    last = events(tmp_path / "run", "evaluate")[-1]
    scores = rescore(tmp_path / "run", {})
    assert scores["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert scores["exact_match"] == last["exact_match"]
    # half of the rows have the answer that the model gives, whatever it is
    run = open_run(tmp_path / "run")
    said = answer(run.model(), run.tokenizer, run.home.test, np.arange(24), run.config)
    rows = [
        {"prompt": row(table_jsonl, at)["prompt"], "completion": said[at] if at % 2 else "other"} for at in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (tmp_path / "table.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    facts = evaluate_tasks(tmp_path / "run", str(tmp_path / "table.yaml"))
    assert facts["results"]["table"]["exact_match"] == 0.5


@pytest.mark.parametrize(
    ("level", "clear", "personal", "withheld"),
    [
        ("none", InTheClear(held_out=True), ["A"], ""),
        ("record", InTheClear(), [], ""),
        ("record", InTheClear(held_out=True), [], "of the clients' own source"),
        ("record", InTheClear(scored=1), [], "of the clients' own source"),
        ("client", InTheClear(owned=1), [], "of the clients' own source"),
        ("record", InTheClear(begun=1, started="runs/a"), [], ""),
        ("record", InTheClear(), ["A"], "no noise covers"),
    ],
)
def test_answers_are_withheld_only_where_a_private_run_would_tell_of_rows(
    level: str, clear: InTheClear, personal: list[str], withheld: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "in_the_clear", lambda home: clear)
    config = resolve([nest({"privacy.level": level, **({"privacy.epsilon": 1.0} if level != "none" else {})})])
    scoring: Any = SimpleNamespace(config=config, personal_names=personal, home=None)
    said = samples.Samples(scoring, cast(Any, None), {})._withheld()
    assert withheld in said
    assert bool(said) is bool(withheld)
