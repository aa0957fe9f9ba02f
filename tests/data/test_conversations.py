"""Rows of language models, in every layout that they come in, as one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft import tasks
from fedpeft.config import DataConfig, configure
from fedpeft.data.formats import hub
from fedpeft.data.layouts import LAYOUTS
from fedpeft.data.sources import Table, digest, locate, raw_rows, read_rows
from fedpeft.errors import ConfigError, DataError
from fedpeft.tasks.encoding import encode_what_can_be

COLUMNS = tasks.find("causal-lm").columns
TURNS: list[Any] = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yo"}]
SHARED: list[Any] = [{"from": "human", "value": "hé"}, {"from": "gpt", "value": "yo"}]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **keys: Any) -> Table:
    return read_rows(locate(path).train, DataConfig(source=str(path), **keys), COLUMNS, labels=None)


def said(table: Table) -> list[dict[str, Any]]:
    return [json.loads(text) for text in table.rows["conversation"]]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def write(path: Path, kind: str) -> Path:
    """Write two rows in one of the ways that conversations are kept."""
    if kind == "lines":
        return lines(path / "rows.jsonl", {"messages": TURNS}, {"messages": TURNS})
    if kind == "rows that are lists":
        return lines(path / "rows.jsonl", TURNS, TURNS)
    if kind == "a list of lists":
        return lines(path / "rows.json", [TURNS, TURNS])
    if kind == "ShareGPT, a list":
        (path / "rows.json").write_text(json.dumps([{"id": 1, "conversations": SHARED}] * 2, indent=1))
    elif kind == "ShareGPT within an object":
        (path / "rows.json").write_text(json.dumps({"data": [{"conversations": SHARED}] * 2}))
    elif kind == "roles within conversations":
        return lines(path / "rows.jsonl", {"conversations": TURNS}, {"conversations": TURNS})
    elif kind == "text within JSON":
        return lines(path / "rows.jsonl", *[{"conversations": json.dumps(SHARED)}] * 2)
    elif kind == "JSON within CSV":
        (path / "rows.csv").write_text("id,conversations\n" + f"1,{quoted(json.dumps(SHARED))}\n" * 2)
        return path / "rows.csv"
    elif kind == "Python's words within CSV":
        (path / "rows.csv").write_text("conversations\n" + f"{quoted(repr(SHARED))}\n" * 2)
        return path / "rows.csv"
    elif kind == "Parquet":
        pq.write_table(pa.table({"messages": [TURNS, TURNS]}), path / "rows.parquet")
        return path / "rows.parquet"
    else:
        datasets.Dataset.from_list([{"conversations": SHARED}] * 2).save_to_disk(str(path / "saved"))
        return path / "saved"
    return path / "rows.json"


WAYS = [
    *("lines", "rows that are lists", "a list of lists", "ShareGPT, a list", "ShareGPT within an object"),
    *("roles within conversations", "text within JSON", "JSON within CSV", "Python's words within CSV", "Parquet"),
    "saved",
]


@pytest.mark.parametrize("way", WAYS)
def test_conversations_become_the_same_however_they_are_kept(tmp_path: Path, way: str) -> None:
    path = write(tmp_path, way)
    assert said(load(path)) == [{"messages": TURNS, "completion": 0}] * 2
    config = configure({"data.source": str(path)})
    assert tasks.named(config) == "causal-lm"
    assert config.data.layout in ("messages", "sharegpt")


def test_instructions_keep_their_parts_and_leave_out_an_empty_input(tmp_path: Path) -> None:
    rows = [{"instruction": "do", "input": given, "output": "done", "text": "all of it"} for given in ("", None, "it")]
    rows[2] |= {"system": "be kind", "history": [["a", "b"]]}
    table = load(lines(tmp_path / "rows.jsonl", *rows))
    assert table.reading.layout == "alpaca"
    empty, null, full = said(table)
    assert empty == null
    assert empty["messages"][0] == {"role": "user", "content": "do", "instruction": "do", "input": ""}
    assert [turn["content"] for turn in full["messages"]] == ["be kind", "a", "b", "do\n\nit", "done"]
    assert full["completion"] == 1
    dolly = lines(tmp_path / "dolly.jsonl", {"instruction": "do", "context": "it", "response": "done"})
    assert said(load(dolly))[0]["messages"][0]["content"] == "do\n\nit"


def test_prompts_and_completions_are_texts_or_turns_under_any_name(tmp_path: Path) -> None:
    strings = lines(tmp_path / "a.jsonl", {"question": "hé", "answer": "yo"})
    turns = lines(tmp_path / "b.jsonl", {"prompt": TURNS[:1], "completion": TURNS[1:]})
    wanted = [{"messages": TURNS, "completion": 1}]
    assert said(load(strings, prompt="question", completion="answer")) == said(load(turns)) == wanted
    assert said(load(lines(tmp_path / "c.jsonl", {"prompt": "[1]", "completion": "x"})))[0]["messages"][0] == {
        "role": "user",
        "content": "[1]",
    }


def test_raw_texts_are_read_where_the_task_is_named(tmp_path: Path) -> None:
    table = load(lines(tmp_path / "rows.jsonl", {"text": "once"}, {"text": "twice"}))
    assert (table.reading.layout, table.rows["text"][:]) == ("text", ["once", "twice"])
    assert configure({"data.source": str(tmp_path / "rows.jsonl")}).data.layout is None


def test_rows_that_a_classifier_reads_stay_its_own(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"text": "a", "label": "x", "prompt": "p", "completion": "c"})
    assert tasks.named(configure({"data.source": str(path)})) == "sequence-classification"


def test_what_else_is_said_of_a_turn_stays_and_texts_in_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [
        {"role": "system", "content": " "},
        {"role": "user", "content": parts, "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        TURNS[1],
        {"role": "user", "content": "thanks"},
    ]
    table = load(lines(tmp_path / "rows.jsonl", {"messages": turns}))
    assert said(table)[0]["messages"] == [
        {"role": "user", "content": "ab", "name": "n"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        TURNS[1],
    ]
    read, dropped = table.reading.notes(locate(tmp_path / "rows.jsonl").train, 1)
    assert read.endswith("are read as data.layout = 'messages' (messages)")
    assert "1 end with a turn that is not the assistant's" in dropped


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
WRONG = {
    "narrator": ([{"role": "narrator", "content": "x"}], r"turn 1 of the unknown role 'narrator' .* Known are system,"),
    "empty": ([], "has no messages in column 'messages'"),
    "missing": (None, "has no messages in column 'messages'"),
    "blank": ([{"role": "user", "content": " "}, TURNS[1]], r"has an empty turn 1 \(user\)"),
    "no answer": (TURNS[:1], "has no turn of the assistant"),
    "two systems": ([{"role": "system", "content": "s"}] * 2 + TURNS, "has 2 system turns"),
    "image": ([{"role": "user", "content": [IMAGE]}, TURNS[1]], "holds a part of type 'image_url' in turn 1"),
    "number": ([{"role": "user", "content": 5}, TURNS[1]], "holds a int as the content of turn 1"),
    "no object": (["hi"], "has as turn 1 no object"),
    "no role": ([{"content": "x"}], "has a turn 1 without a role"),
    "no list": ("hello", "holds no list of turns"),
}


@pytest.mark.parametrize("cell", WRONG)
def test_a_row_that_teaches_nothing_is_named_by_number_and_column(tmp_path: Path, cell: str) -> None:
    value, told = WRONG[cell]
    path = lines(tmp_path / "rows.jsonl", {"messages": TURNS}, {"messages": value})
    with pytest.raises(DataError, match=f"^row 2 of .*{told}") as caught:
        load(path)
    assert "column 'messages'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_no_layout_and_settings_of_two_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"x": "1"})
    with pytest.raises(DataError, match=r"are of no layout that is read\. They have: x\. Layouts are messages \("):
        load(path)
    for keys, told in (
        ({"layout": "mesages"}, "Did you mean 'messages'"),
        ({"messages": "a", "prompt": "b"}, "columns of different layouts"),
        ({"layout": "text", "prompt": "b"}, r"data\.prompt = 'b' is of no use to data\.layout = 'text'"),
    ):
        with pytest.raises(ConfigError, match=told):
            tasks.of(configure({f"data.{key}": value for key, value in keys.items()}))
    with pytest.raises(ConfigError, match=r"data\.messages = 'a' is for language models"):
        tasks.of(configure({"data.messages": "a", "model.task": "sequence-classification"}))


def test_a_few_other_rows_change_no_layout_and_the_cache_knows_what_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}, *[{"messages": TURNS}] * 3)
    with pytest.raises(DataError, match=r"row 1 of .* has no messages"):
        load(path)
    place, names = locate(path).train, ({}, {"layout": "messages"}, {"messages": "messages"}, {"text": "t"})
    assert len({digest(place, DataConfig(**keys), COLUMNS) for keys in names}) == len(names)  # type: ignore[arg-type]
    assert digest(place, DataConfig(), ()) == digest(place, DataConfig(layout="messages"), ())


def test_where_failures_must_not_be_seen_a_bad_row_is_named_and_left_out(tmp_path: Path, tiny_llama: Path) -> None:
    good = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    path = lines(tmp_path / "rows.jsonl", {"messages": WRONG["narrator"][0]}, good, good)
    with path.open("a") as file:
        file.write("{damaged}\n")
    config = configure({"model.name": str(tiny_llama), "model.task": "causal-lm", "data.max_length": 16})
    split, problems = encode_what_can_be(config, tiny_llama, path)
    assert (len(split), sorted(problems)) == (2, [1, 4])
    assert problems[1].startswith(f"row 1 of '{path}' has a turn 1 of the unknown role")
    assert len(raw_rows(locate(path).train, config.data, COLUMNS, frozenset())) == 4
    told, words = tmp_path / "told.jinja", []
    for text in ("{{ messages[0]['content'] }} ", "w5 {{ messages[0]['content'] }} "):  # another text of the same name
        told.write_text(text + "{% generation %}{{ messages[1]['content'] }}{% endgeneration %}")
        templated = config.model_copy(update={"data": config.data.model_copy(update={"template": str(told)})})
        words.append(encode_what_can_be(templated, tiny_llama, path)[0].tensors["tokens"])
    assert len(words[1]) == len(words[0]) + 2


def test_a_hub_set_is_read_by_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    part = datasets.Dataset.from_list([{"question": "hé", "answer": "yo"}])

    def answer(name: str, configuration: str | None = None) -> datasets.DatasetDict:
        assert (name, configuration) == ("openai/gsm8k", "main")
        return datasets.DatasetDict(train=part, test=part)

    monkeypatch.setattr(hub, "hub_dataset", answer)
    data = DataConfig(source="openai/gsm8k:main:train", prompt="question", completion="answer")
    place = locate(data.source).train
    assert (place.part, place.others) == ("train", ("openai/gsm8k:main:test",))
    assert said(read_rows(place, data, COLUMNS, labels=None)) == [{"messages": TURNS, "completion": 1}]


def test_nested_cells_stay_refused_where_a_text_is_wanted(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"text": ["a"]}, {"text": "b"})
    with pytest.raises(DataError, match=r"row 1 of .* holds a list in column 'text'\. Give a text or a number"):
        load(path, text="text")


@pytest.mark.parametrize("name", LAYOUTS.ours)
def test_a_layout_names_keys_that_it_has(name: str) -> None:
    layout = LAYOUTS.find(name)
    assert {*layout.keys, *layout.optional, *layout.nested} <= set(layout.columns)
    assert layout.required
