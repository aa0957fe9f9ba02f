from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from fedpeft.config import RunConfig
from fedpeft.errors import RunDirectoryError
from fedpeft.report.loading import loading_code
from fedpeft.report.page import render, write_report
from fedpeft.runs.history import History

Events = Callable[..., list[dict[str, Any]]]
Config = Callable[..., RunConfig]
Maker = Callable[..., Path]


def page_of(run: Path, config: RunConfig, events: list[dict[str, Any]]) -> str:
    """Return the page without its plots, which take the time."""
    return render(run, config, History.from_events(events))


def table_rows(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]


def test_a_report_is_one_file_with_scores_and_its_plots_inlined(
    run_directory: Maker, config: Config, events: Events
) -> None:
    run = run_directory(config(), events(4, domains=True))
    assert write_report(run) == run / "report.html"
    assert sorted(path.name for path in (run / "plots").iterdir()) == [
        "accuracy.png", "aggregation_error.png", "communication.png", "loss.png",
    ]  # fmt: skip
    page = (run / "report.html").read_text()
    for plot in (run / "plots").iterdir():
        assert base64.b64encode(plot.read_bytes()).decode() in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 8  # light and dark
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page
    assert "http://" not in page.replace("http-equiv", "")
    assert "https://" not in page
    assert "prefers-color-scheme: dark" in page


def test_each_evaluated_round_is_a_row_of_scores(run_directory: Maker, config: Config, events: Events) -> None:
    stream = events(4, every=2)
    rows = table_rows(page_of(run_directory(config(), stream), config(), stream))
    assert ["0", "0.2500", "0.1875", "2.0000", "-", "-", "-", "0 B", "-"] in rows
    assert ["2", "0.5000", "0.4375", "1.5000", "0.7500", "0.2500", "0.0625", "7.0 MB", "8.2 s"] in rows
    assert [row[0] for row in rows if len(row) == 9] == ["round", "0", "2", "4"]


def test_domains_and_clients_have_tables_where_they_were_scored(
    run_directory: Maker, config: Config, events: Events
) -> None:
    stream = events(4, domains=True, by_client=True, faults={2: ("1", "no reply")})
    run = run_directory(config(), stream)
    rows = table_rows(page_of(run, config(), stream))
    assert ["sketch", "0.1500", "0.6500", "+0.5000"] in rows
    assert ["1", "101", "3", "1", "0.3750", "0.5 s", "0.2400", "0.7400"] in rows
    assert ["2", "1", "no reply"] in rows
    plain = page_of(run, config(), events(4))
    assert "Domains" not in plain
    assert "Faults" not in plain
    assert ["1", "101", "4", "0", "0.3750", "0.5 s"] in table_rows(plain)


def statement(**facts: Any) -> dict[str, Any]:
    client = {"epsilon": 1.8, "noise_multiplier": 1.25, "sample_rate": 0.1, "steps": 40, "examples": 100}
    known = {"level": "record", "epsilon_max": 1.8, "delta": 1e-5, "guarantee": True, "statement": "All <is> well."}
    return known | {"clients": {"0": client, "<b>": client | {"epsilon": None}}} | facts


def test_a_private_run_has_a_card_a_paragraph_and_a_table_of_clients(
    run_directory: Maker, config: Config, events: Events
) -> None:
    chosen, stream = config(privacy__level="record", privacy__epsilon=3), events(4, private=True)
    run = run_directory(chosen, stream)
    (run / "privacy.json").write_text(json.dumps(statement()))
    page = page_of(run, chosen, stream)
    assert "<span>epsilon</span><b>1.800</b><span>delta 1e-05, record level; guaranteed</span>" in page
    assert "<p>All &lt;is&gt; well.</p>" in page
    rows = table_rows(page)
    assert ["0", "1.800", "1.25", "0.1", "40", "100"] in rows
    assert ["<b>", "-", "1.25", "0.1", "40", "100"] in rows
    assert [
        "2",
        "0.5000",
        "0.4375",
        "1.5000",
        "0.2500",
        "0.0625",
        "1.000",
        "7.0 MB",
        "8.2 s",
    ] in rows  # no training loss
    (run / "privacy.json").write_text(json.dumps(statement(guarantee=False, epsilon_max=None, clients={})))
    page = page_of(run, chosen, stream)
    assert "<b>-</b><span>delta 1e-05, record level; no guarantee: seeded</span>" in page
    assert "<p>All &lt;is&gt; well.</p>" in page


def test_a_private_run_that_goes_on_has_a_bound_and_no_statement_yet(
    run_directory: Maker, config: Config, events: Events
) -> None:
    chosen = config(privacy__level="client", privacy__epsilon=3)
    stream = events(2, private=True, reason=None)
    page = page_of(run_directory(chosen, stream), chosen, stream)
    assert "<span>epsilon so far, at most</span><b>1.000</b><span>delta 1e-05, client level</span>" in page
    assert "No statement of this run&#39;s privacy is on record. It is written when the run ends" in page
    assert "Privacy" not in page_of(run_directory(config(), events(2), "second"), config(), events(2))


def test_a_client_level_run_has_one_row_for_all_clients_where_they_are_alike(
    run_directory: Maker, config: Config, events: Events
) -> None:
    chosen, stream = config(privacy__level="client", privacy__epsilon=3), events(2, private=True)
    run = run_directory(chosen, stream)
    one = {"epsilon": 1.8, "noise_multiplier": 1.25, "sample_rate": 0.1, "steps": 2, "examples": None}
    (run / "privacy.json").write_text(json.dumps(statement(level="client", clients={str(i): one for i in range(30)})))
    assert ["all 30 clients", "1.800", "1.25", "0.1", "2", "-"] in table_rows(page_of(run, chosen, stream))
    two = {"0": one, "1": one | {"steps": 1}}
    (run / "privacy.json").write_text(json.dumps(statement(level="client", clients=two)))
    rows = table_rows(page_of(run, chosen, stream))
    assert ["0", "1.800", "1.25", "0.1", "2", "-"] in rows
    assert ["1", "1.800", "1.25", "0.1", "1", "-"] in rows


def test_a_page_promises_no_losses_under_privacy_and_no_repeat_of_secret_noise(
    run_directory: Maker, config: Config, events: Events
) -> None:
    def page(**settings: object) -> str:
        chosen, stream = config(**settings), events(2, private=bool(settings))
        return page_of(run_directory(chosen, stream, str(len(settings))), chosen, stream)

    promised, reproduces = "Loss and time are those of", "in the run directory, reproduces the run."
    plain = page()
    assert promised in plain
    assert reproduces in plain
    private = {"privacy__level": "record", "privacy__epsilon": 3}
    secret = page(**private, privacy__rng="secure")
    assert promised not in secret
    assert "Loss and time are not sent" in secret
    assert reproduces not in secret
    assert "repeats the run with other noise: its randomness is secret (privacy.rng = secure)." in secret
    assert promised in page(**private, privacy__rng="seeded", privacy__release_metrics=True)


def test_foreign_text_is_escaped(run_directory: Maker, config: Config, events: Events) -> None:
    evil = "<script>alert('&')</script>"
    stream = events(2, clients=(evil, "b"), faults={1: (evil, f"raised: {evil}")}, domains=True, reason=evil)
    stream[0]["domains"] = {evil: stream[0]["domains"]["photo"]}
    stream[-2]["domains"] = {evil: stream[-2]["domains"]["photo"]}
    run = run_directory(config(model__name=f"/models/{evil}"), stream, name="<b>run")
    page = page_of(run, config(model__name=f"/models/{evil}"), stream)
    assert "<script" not in page
    assert "<b>run" not in page
    assert ["1", evil, f"raised: {evil}"] in table_rows(page)
    # the reason, the worst domain, its row, the client's row, its fault twice, the base model in code and configuration
    assert page.count(str(escape(evil))) >= 8


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("completed", ">completed<"),
        ("interrupted", ">interrupted<"),
        (None, ">running<"),
        ("round 3: nobody", "round 3: nobody"),
    ],
)
def test_the_page_says_how_the_run_ended(
    run_directory: Maker, config: Config, events: Events, reason: str | None, words: str
) -> None:
    stream = events(2, planned=4, reason=reason)
    page = page_of(run_directory(config(), stream), config(), stream)
    assert words in page
    assert "2 / 4" in page


@pytest.mark.parametrize("kept", [(), ("evaluate",), ("round", "client", "end"), ("fault",)])
def test_a_report_can_be_written_of_whatever_is_there(
    run_directory: Maker, config: Config, events: Events, kept: tuple[str, ...]
) -> None:
    stream = [event for event in events(1, faults={1: ("1", "no reply")}) if event["event"] in kept]
    run = run_directory(config(), stream)
    (run / "environment.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "rou')
    page = write_report(run).read_text()
    assert "Configuration" in page
    assert ("no reply" in page) == ("fault" in kept)


def test_a_report_written_again_shows_what_came_since(run_directory: Maker, config: Config, events: Events) -> None:
    stream = [event for event in events(2) if event["event"] == "evaluate"]
    run = run_directory(config(), stream[:1])
    assert "0.5000" not in write_report(run).read_text()
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in stream))
    assert "0.5000" in write_report(run).read_text()


def test_configuration_and_environment_are_shown(run_directory: Maker, config: Config, events: Events) -> None:
    run = run_directory(config(), [])
    page = html.unescape(page_of(run, config(), []))
    assert (run / "config.toml").read_text().strip() in page
    assert ["torch", "2.0"] in table_rows(page)


def test_a_page_that_cannot_be_written_leaves_the_old_one(run_directory: Maker, config: Config) -> None:
    run = run_directory(config(), [])
    (run / "report.html").write_text("old")
    (run / ".report.html").mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"


def test_a_folder_that_is_no_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run directory"):
        write_report(tmp_path)


# --- loading the adapter


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("sequence-classification", "AutoModelForSequenceClassification"),
        ("image-classification", "AutoModelForImageClassification"),
        ("causal-lm", "AutoModelForCausalLM"),
    ],
)
def test_the_code_names_the_tasks_class_and_the_base_that_the_adapter_names(
    run_directory: Maker, config: Config, task: str, kind: str
) -> None:
    chosen = config(model__task=task, model__name="preset:x")
    run = run_directory(chosen, [], name="it's \\ a run")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/cache/ba'se"}))
    code = loading_code(run, chosen)
    compile(code, "code", "exec")
    assert f"base = {kind}.from_pretrained(" in code
    assert repr("/cache/ba'se") in code
    assert repr(str(run / "adapter")) in code
    page = page_of(run, chosen, [])
    assert code.strip() in html.unescape(page)
    assert "written when the run ends" not in page


def test_code_of_a_base_with_code_of_its_own_trusts_it_as_the_run_did(run_directory: Maker, config: Config) -> None:
    chosen = config(model__trust_remote_code=True)
    assert "trust_remote_code=True" in loading_code(run_directory(chosen, []), chosen)
    assert "trust_remote_code" not in loading_code(run_directory(config(), [], name="second"), config())


@pytest.mark.parametrize(
    ("fixture", "task"),
    [("tiny_bert", "sequence-classification"), ("tiny_vit", "image-classification"), ("tiny_llama", "causal-lm")],
)
def test_the_code_loads_what_was_saved(
    request: pytest.FixtureRequest, run_directory: Maker, config: Config, fixture: str, task: str
) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    folder, labels = request.getfixturevalue(fixture), ["a", "b", "c"]
    heads = {"sequence-classification": "SequenceClassification", "image-classification": "ImageClassification"}
    options: dict[str, Any] = {} if task == "causal-lm" else {"num_labels": 3, "ignore_mismatched_sizes": True}
    kind = getattr(transformers, f"AutoModelFor{heads.get(task, 'CausalLM')}")
    lora = LoraConfig(
        r=2,
        target_modules=["query", "value"] if fixture == "tiny_bert" else ["q_proj", "v_proj"],
        modules_to_save=None if task == "causal-lm" else ["classifier"],
        init_lora_weights=False,
    )
    model = get_peft_model(kind.from_pretrained(folder, **options), lora).eval()
    chosen = config(model__task=task, model__name=str(folder))
    run = run_directory(chosen, [])
    model.save_pretrained(str(run / "adapter"))
    (run / "adapter" / "labels.json").write_text(json.dumps(labels))

    names: dict[str, Any] = {}
    exec(loading_code(run, chosen), names)
    if task == "image-classification":
        inputs = {"pixel_values": torch.ones(1, 3, 8, 8)}
    else:
        inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    with torch.no_grad():
        assert torch.equal(names["model"](**inputs).logits, model(**inputs).logits)
    if task != "causal-lm":
        assert names["model"].config.id2label == {0: "a", 1: "b", 2: "c"}
