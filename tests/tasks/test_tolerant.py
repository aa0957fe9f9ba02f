"""Rows of which some cannot be encoded, where nobody may see which."""

from __future__ import annotations

import json
from pathlib import Path

from fedpeft import tasks
from fedpeft.config import configure
from fedpeft.data.sources import locate, raw_rows
from fedpeft.tasks.tolerant import encode_what_can_be


def test_where_failures_must_not_be_seen_a_bad_row_is_named_and_left_out(tmp_path: Path, tiny_llama: Path) -> None:
    good = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    bad = {"messages": [{"role": "narrator", "content": "x"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (bad, good, good)) + "{damaged}\n")
    config = configure({"model.name": str(tiny_llama), "model.task": "causal-lm", "data.max_length": 16})
    split, problems = encode_what_can_be(config, tiny_llama, path)
    assert (len(split), sorted(problems)) == (2, [1, 4])
    assert problems[1].startswith(f"row 1 of '{path}' has a turn 1 of the unknown role")
    assert len(raw_rows(locate(path).train, config.data, tasks.find("causal-lm").columns, frozenset())) == 4
    told, words = tmp_path / "told.jinja", []
    for text in ("{{ messages[0]['content'] }} ", "w5 {{ messages[0]['content'] }} "):  # another text of the same name
        told.write_text(text + "{% generation %}{{ messages[1]['content'] }}{% endgeneration %}")
        templated = config.model_copy(update={"data": config.data.model_copy(update={"template": str(told)})})
        words.append(encode_what_can_be(templated, tiny_llama, path)[0].tensors["tokens"])
    assert len(words[1]) == len(words[0]) + 2


def test_rows_that_are_skipped_are_counted_with_those_that_cannot_be_encoded(tmp_path: Path, tiny_llama: Path) -> None:
    good = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    silent = {"messages": [good["messages"][0], {"role": "assistant", "content": "w2", "weight": 0}]}
    path = tmp_path / "rows.jsonl"
    for damaged in ("", "{damaged}\n"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": []}, good, silent)) + damaged)
        config = configure({"model.name": str(tiny_llama), "model.task": "causal-lm", "data.empty": "skip"})
        split, problems = encode_what_can_be(config, tiny_llama, path)
        assert (len(split), sorted(problems)) == (1, [1, 3, 4] if damaged else [1, 3])
