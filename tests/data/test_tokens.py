"""What of a prompt and its completion is kept where both are too long together, and who is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedpeft import tasks
from fedpeft.config import RunConfig, Truncate, nest, resolve
from fedpeft.data.chat.rows import RowEncoder
from fedpeft.errors import ConfigError, DataError
from fedpeft.simulations.plan import plan
from fedpeft.simulations.simulate import simulate
from fedpeft.tasks.encoding import encode

WORDS = [f"{kind}{index}" for kind in "pc" for index in range(30)]
vocabulary = {word: index for index, word in enumerate(["[UNK]", "</s>", *WORDS])}
whole_words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
whole_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole_words, unk_token="[UNK]", eos_token="</s>")


@given(
    p=st.integers(1, 30), c=st.integers(1, 30), max_length=st.integers(2, 40), way=st.sampled_from(get_args(Truncate))
)
@settings(max_examples=150)
def test_each_way_of_cutting_keeps_what_it_says(p: int, c: int, max_length: int, way: Truncate) -> None:
    prompt, completion = WORDS[:p], WORDS[30 : 30 + c]
    turns = [{"role": "user", "content": " ".join(prompt)}, {"role": "assistant", "content": " ".join(completion)}]
    cell = json.dumps({"messages": turns, "completion": 1})
    (row,) = RowEncoder(tokenizer, max_length, way).rows({"conversation": [cell]}, ["row 1"])
    kept = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    before, told = kept[: row.answer], kept[row.answer :]
    assert row.counted.tolist() == [False] * len(before) + [True] * len(told)
    assert row.reference == " ".join(completion)
    whole = [*completion, "</s>"]
    assert before == prompt[p - len(before) :]
    assert told == whole[: len(told)]
    assert len(kept) == min(max_length, p + c + 1)
    assert row.cut == p + c + 1 - len(kept)
    assert ("completion" in row.lost, bool(row.lost - {"completion"})) == (len(told) < len(whole), len(before) < p)
    least = {"longest": min(p, max_length // 2), "prompt": 0, "completion": min(p, max_length - 1)}[way]
    assert len(before) >= least
    assert len(told) >= {"longest": min(c + 1, max_length // 2), "prompt": min(c + 1, max_length), "completion": 1}[way]


SIZES = [(4, 2)] * 6 + [(20, 2)] * 3 + [(2, 20)] * 2 + [(20, 20)]


@pytest.fixture
def exchanges(tmp_path: Path, tiny_llama: Path) -> dict[str, object]:
    """Settings of a run on rows of which half do not fit."""
    words = [word for word in AutoTokenizer.from_pretrained(tiny_llama).get_vocab() if word.startswith("w")]
    rows = [{"prompt": " ".join(words[:p]), "completion": " ".join(words[20 : 20 + c])} for p, c in SIZES]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model.name": str(tiny_llama),
        "model.task": "causal-lm",
        "data.source": str(tmp_path / "rows.jsonl"),
        "data.max_length": 10,
        "federation.clients": 2,
        "federation.rounds": 1,
        "train.local_steps": 1,
        "train.batch_size": 2,
        "adapter.rank": 2,
        "simulation.workers": 0,
    }


def config_of(exchanges: dict[str, object], **more: object) -> RunConfig:
    return resolve([nest(exchanges), nest({name.replace("__", "."): value for name, value in more.items()})])


@pytest.mark.parametrize(
    ("way", "told"),
    [
        (None, "4 lose the beginning of the prompt, 3 lose the end of the completion"),
        ("prompt", "3 lose the whole prompt, 3 lose the beginning of the prompt, 3 lose the end of the completion"),
        ("completion", "4 lose the beginning of the prompt, 6 lose the end of the completion"),
    ],
)
def test_rows_that_are_cut_are_counted(exchanges: dict[str, object], way: str | None, told: str) -> None:
    config = config_of(exchanges, **({} if way is None else {"data__truncate": way}))
    for _ in range(2):  # from the cache as well
        (note,) = encode(config, Path(str(exchanges["model.name"]))).cautions
        assert note.startswith(f"of 12 rows of '{exchanges['data.source']}' {told}, cut to data.max_length = 10 with ")
    assert encode(config_of(exchanges, data__max_length=60), Path(str(exchanges["model.name"]))).cautions == ()


def test_a_run_and_its_plan_say_first_what_is_cut_and_a_private_run_keeps_it_to_itself(
    exchanges: dict[str, object], tmp_path: Path
) -> None:
    config = config_of(exchanges)
    read, note = plan(config).notes
    assert read.endswith("are read as data.layout = 'completion' (prompt, completion)")
    events: list[dict[str, object]] = []
    simulate(config, tmp_path / "run", listener=events.append)
    assert [(event["event"], event["message"]) for event in events[:2]] == [("note", read), ("warning", note)]
    assert "lose the" not in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    events.clear()
    private = config_of(exchanges, privacy__level="record", privacy__noise_multiplier=1.0)
    simulate(private, tmp_path / "private", listener=events.append)
    assert events
    assert not any("lose the" in str(event) for event in events)


def test_rows_without_a_token_that_counts_are_refused(exchanges: dict[str, object], tmp_path: Path) -> None:
    model = Path(str(exchanges["model.name"]))
    with pytest.raises(DataError, match=r"data\.max_length = 1, but a prompt and a completion are two tokens"):
        encode(config_of(exchanges, data__max_length=1), model)
    with pytest.raises(ConfigError, match=r"data\.truncate = 'prompt' is for prompts and completions"):
        tasks.of(resolve([nest({"data.truncate": "prompt"})]))
