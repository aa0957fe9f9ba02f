"""The likeliest of the test rows' answers, against each one's loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import DataError
from fedpeft.finished import open_run
from fedpeft.generation import choosing
from fedpeft.generation.choosing import choose, options_of
from fedpeft.rescoring import rescore
from fedpeft.tasks.encoding import encode_rows


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def three(table_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of nine prompts, each with one of three answers: that which its third row was taught."""
    rows = [json.loads(line) for line in table_jsonl.read_text().splitlines()]
    for at, row in enumerate(rows[:9]):
        row["completion"] = rows[at // 3 * 3]["completion"]
    return written(tmp_path_factory.mktemp("three") / "three.jsonl", rows[:9])


def test_the_likeliest_answer_is_the_one_of_least_loss_with_its_end(taught: Path, three: Path) -> None:
    run = open_run(taught)
    config, model = run.config, run.model()
    split = encode_rows(run.home.config, run.home.folder, str(three), (), test=True)
    options = options_of(split)
    assert sorted(options) == list(options)
    assert all(tokens[-1] == run.tokenizer.eos_token_id for tokens in options.values())
    expected = []
    for prompt in split.prompts(range(len(split))):
        losses = {}
        for text, tokens in options.items():
            ids = torch.cat([prompt, tokens])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
            losses[text] = float(torch.nn.functional.cross_entropy(logits, tokens, reduction="sum"))
        expected.append(min(losses, key=losses.__getitem__))
    assert len(set(expected)) == 3
    assert choose(model, split, np.arange(len(split)), config) == expected
    chosen = choose(model, split, np.array([4, 0]), config)
    assert chosen == [expected[4], expected[0]]
    assert not model.training


def test_a_run_is_judged_by_the_answers_that_it_finds_likeliest(taught: Path, three: Path) -> None:
    scores = rescore(taught, {"data": {"test": str(three), "metric": "choice_likelihood,exact_match"}})
    # of three rows with an answer, the model was taught it for one
    assert scores["choice_likelihood"] >= scores["exact_match"] == pytest.approx(1 / 3)


def test_rows_whose_answers_are_no_options_are_refused(
    taught: Path, table_jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "MOST_OPTIONS", 23)
    with pytest.raises(DataError, match="24 different ones, and 2 to 23 are wanted"):
        rescore(taught, {"data": {"metric": "choice_likelihood"}})


def test_one_answer_is_no_choice(taught: Path) -> None:
    split: EncodedSplit = open_run(taught).home.test
    with pytest.raises(DataError, match="1 different ones"):
        options_of(split.take([3]))
