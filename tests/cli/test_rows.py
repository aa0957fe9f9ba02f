"""``fedpeft rows``: what it prints for people and for machines."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from fedpeft.cli.app import app


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, ["rows", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_rows_are_shown_with_what_counts(tiny_llama: Path, pairs_jsonl: Path) -> None:
    words = (f"model.name={tiny_llama}", f"data.source={pairs_jsonl}", "data.prompt=prompt")
    words = (*words, "data.completion=completion", "--show", "2")
    rows = json.loads(printed(*words, "--json"))["rows"]
    assert len(rows) == 2
    for row in rows:
        assert len(row["tokens"]) == len(row["counted"]) == len(row["ids"])
        assert not row["counted"][0]
        assert row["counted"][-1]
        assert row["cut"] == 0
    shown = printed(*words)
    assert shown.count("row ") == 2
    assert shown.count("«") == shown.count("»") == 2
    assert "0 cut" in shown


def test_rows_keep_their_numbers_where_some_are_skipped_before_or_after_reading(
    tiny_llama: Path, tmp_path: Path
) -> None:
    answer = {"role": "assistant", "content": "w2"}
    good = {"messages": [{"role": "user", "content": "w1"}, answer]}
    silent = {"messages": [{"role": "user", "content": "w1"}, {**answer, "weight": 0}]}
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": []}, good, silent, silent, good, {"messages": None}, good]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"model.name={tiny_llama}", f"data.source={path}", f"data.test={path}", "data.empty=skip", "--json")
    told = CliRunner().invoke(app, ["rows", *words, "data.template=chatml", "data.max_length=99"])
    assert told.exit_code == 0, told.output
    assert [row["row"] for row in json.loads(told.stdout)["rows"]] == [2, 5, 7]
    assert "\nwarning: 4 rows of" in told.stderr
    assert told.stderr.startswith("note: rows of")


def test_of_rows_to_classify_no_token_counts_and_long_ones_say_what_they_lost(text_csv: Path, tiny_bert: Path) -> None:
    words = (f"model.name={tiny_bert}", f"data.source={text_csv}", "data.max_length=4", "--show", "3", "--json")
    rows = json.loads(printed(*words))["rows"]
    assert not any(any(row["counted"]) for row in rows)
    assert any(row["cut"] for row in rows)
    assert all(len(row["tokens"]) <= 4 for row in rows)
