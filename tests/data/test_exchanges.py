"""A place's conversations as tensors: what is kept, skipped, and said of them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch

from fedpeft.bases import Inputs
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.data.chat.notes import cut_notes
from fedpeft.data.exchanges import encode_conversations
from fedpeft.data.splits import EncodedSplit, Encoding
from fedpeft.data.tokens import length_of
from fedpeft.errors import ConfigError, DataError
from fedpeft.places import Place
from fedpeft.tasks import of
from tests.data.chat.styles import STYLES, letters, talk

PLACE = Place("rows.jsonl", "json", None)
UNKNOWN = Inputs(None, None, None, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("letters")
    letters(STYLES[0].template).save_pretrained(path)
    return path


def configured(**settings: object) -> RunConfig:
    return resolve(
        [nest({"model.task": "causal-lm", **{name.replace("__", "."): value for name, value in settings.items()}})]
    )


def made(config: RunConfig, folder: Path, *conversations: list[dict[str, str]]) -> Encoding:
    cells = [json.dumps({"messages": turns, "completion": 0}) for turns in conversations]
    rows = datasets.Dataset.from_dict({"conversation": cells, "row": list(range(1, len(cells) + 1))})
    return encode_conversations(config, folder, UNKNOWN, PLACE, rows)


UNANSWERED = [{"role": "user", "content": "Anyone?"}]


def test_rows_without_a_token_that_counts_are_refused_or_skipped_by_name(folder: Path) -> None:
    with pytest.raises(DataError, match=r"row 2 of .* that the loss could count.* data\.empty = 'skip'"):
        made(configured(), folder, talk(1), UNANSWERED, talk(2))
    skipping = configured(data__empty="skip")
    encoding = made(skipping, folder, talk(1), UNANSWERED, talk(2))
    assert encoding.kept is not None
    assert encoding.kept.tolist() == [0, 2]
    (note,) = cut_notes(skipping, PLACE, 3, dict(encoding.cuts), 1024)
    assert note.startswith("1 rows of 'rows.jsonl' have no token that the loss counts and are skipped")
    with pytest.raises(DataError, match="no row of"):
        made(skipping, folder, UNANSWERED)


def test_rows_that_the_template_alone_fills_are_refused_or_skipped_by_name(folder: Path) -> None:
    short = [{"role": "user", "content": ""}, {"role": "assistant", "content": "yes"}]
    tools = [{"role": "user", "content": ""}, *[{"role": "tool", "content": ""}] * 3, short[1]]
    with pytest.raises(
        DataError, match=r"^row 2 of .*: data\.max_length = 30, but what the chat template writes around"
    ):
        made(configured(data__max_length=30), folder, short, tools)
    encoding = made(configured(data__max_length=30, data__empty="skip"), folder, short, tools)
    assert (encoding.kept.tolist(), encoding.cuts["empty"]) == ([0], 1)  # type: ignore[union-attr]


def test_prompts_and_references_are_those_of_the_last_answers(folder: Path) -> None:
    encoding = made(configured(), folder, talk(1), talk(3), talk(2))
    split = EncodedSplit("causal-lm", encoding.tensors, pad_token_id=encoding.pad_token_id)
    tokenizer = letters(STYLES[0].template)
    for some in (split, split.take([2, 0]), split.append(encoding.tensors)):
        for index in range(len(some)):
            (prompt,), (reference,) = some.prompts([index]), some.references([index])
            turns = talk([1, 3, 2][int(some.indices_stored[index]) % 3])
            assert tokenizer.decode(prompt).endswith(turns[-2]["content"] + "<|im_end|>\n<|im_start|>assistant\n")
            assert prompt.dtype == torch.int64
            assert reference == turns[-1]["content"]
    assert split.references([]) == []


def test_rows_that_were_cut_are_counted_by_what_they_lost(folder: Path) -> None:
    config = configured(data__max_length=200)
    encoding = made(config, folder, talk(1), talk(5, system=True))
    (note,) = cut_notes(config, PLACE, 2, dict(encoding.cuts), 200)
    assert note == (
        "of 2 rows of 'rows.jsonl' 1 lose whole early turns, cut to data.max_length = 200 with data.truncate = "
        "'longest'; set more of the one, or of the other 'prompt' or 'completion'"
    )
    assert encoding.tensors["cut"].tolist()[0] == 0
    assert encoding.tensors["cut"].tolist()[1] > 0


def test_the_length_follows_from_task_and_model_where_it_is_not_set() -> None:
    unset = configured()
    assert length_of(unset, UNKNOWN, continues=True) == 1024
    assert length_of(unset, Inputs(512, None, None, 3), continues=True) == 512
    assert length_of(unset, Inputs(4096, None, None, 3), continues=True) == 1024
    assert length_of(unset, UNKNOWN, continues=False) == 128
    with pytest.raises(DataError, match=r"data\.max_length = 600, but the model reads 512"):
        length_of(configured(data__max_length=600), Inputs(512, None, None, 3), continues=True)


@pytest.mark.parametrize("key", ["template", "train_on", "empty"])
def test_what_is_for_turns_alone_is_refused_for_texts_to_classify(key: str) -> None:
    value = {"template": "alpaca", "train_on": "last", "empty": "skip"}[key]
    with pytest.raises(ConfigError, match=rf"data\.{key} = '{value}' is for language models.*set model.task=causal-lm"):
        of(resolve([nest({f"data.{key}": value})]))
    with pytest.raises(ConfigError, match=rf"data\.{key} = '{value}' is for language models.*'; drop it$"):
        of(resolve([nest({f"data.{key}": value, "model.task": "sequence-classification"})]))
