"""Texts that a model wrote, judged against references: against definitions, and the libraries' own totals."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedpeft import tasks
from fedpeft.config import RunConfig, nest, resolve
from fedpeft.errors import ConfigError
from fedpeft.tasks.answers import bleu_of, bleu_parts, choice_accuracy, exact_match, rouge_l, token_f1
from fedpeft.tasks.code import code_in, passes
from fedpeft.tasks.metrics import Scores, asked, find


def test_texts_match_whatever_their_case_articles_and_punctuation() -> None:
    answers = ["The cat!", "a  dog", "cat", "", "?", "!"]
    assert exact_match(answers, ["cat", "Dog.", "dog", "", "?", "?"])[:, 0].tolist() == [1, 1, 0, 1, 1, 0]


def test_f1_counts_the_words_that_both_have() -> None:
    found = token_f1(["a red red car", "", "", "blue"], ["the red car", "", "x", "red"])[:, 0]
    assert found.tolist() == pytest.approx([2 * 2 / 5, 1, 0, 0])


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    found = rouge_l(["the cat sat here", "running"], ["the cat was here today", "run"])[:, 0]
    assert found[0] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert found[1] == 0  # no stemmer


def test_bleu_of_rows_together_is_that_of_the_corpus() -> None:
    from sacrebleu.metrics import BLEU

    answers = ["the cat is on the mat today", "he reads a book in the park", "no", ""]
    references = ["the cat is on the mat", "he read the book in the park", "yes it is", "something"]
    parts = bleu_parts(answers, references)
    expected = BLEU().corpus_score(answers, [references]).score
    assert bleu_of(parts) == pytest.approx(expected)
    assert bleu_of(np.concatenate([parts[2:], parts[:2]])) == pytest.approx(expected)
    assert 5 < expected < 95


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("B", "B", 1),
        ("(B) Paris", "B. Paris", 1),
        ("**C**", "(C)", 1),
        ("I think so. The answer is D.", "D", 1),
        ("Answer: A", "A", 1),
        ("A dog has four legs", "A", 0),  # an article
        ("The answer is a matter of taste", "A", 0),
        ("C", "B", 0),
        ("", "B", 0),
        ("Positive.", "positive", 1),
        ("positive, since sales rose", "positive", 1),
        ("positively", "positive", 0),
        ("not positive", "positive", 0),
    ],
)
def test_a_choice_is_the_first_letter_or_the_words_that_an_answer_begins_with(
    answer: str, reference: str, right: int
) -> None:
    assert choice_accuracy([answer], [reference])[0, 0] == right


def test_code_passes_where_its_tests_run_to_their_end() -> None:
    answer = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nHave fun."
    assert code_in(answer) == "def double(x):\n    return 2 * x\n"
    assert passes(answer, "assert double(2) == 4")
    assert not passes(answer, "assert double(2) == 5")
    assert not passes("import sys\nsys.exit(0)", "assert False")  # it ended, but not at its end
    assert not passes("def double(x) return", "assert True")


def test_code_that_never_ends_or_takes_all_memory_fails_in_time() -> None:
    before = time.monotonic()
    assert not passes("while True: pass", "", seconds=0.3)
    assert not passes("x = bytearray(4 << 30)", "")
    assert time.monotonic() - before < 5


def config(**settings: object) -> RunConfig:
    base = {"model.task": "causal-lm", "data.prompt": "p", "data.completion": "c"}
    return resolve([nest(base | {name.replace("__", "."): value for name, value in settings.items()})])


def test_metrics_of_answers_are_asked_for_by_name_in_their_order() -> None:
    wanted = config(data__metric="rouge, exact_match,rouge")
    assert [metric.name for metric in asked(wanted, tasks.of(wanted))] == ["rouge", "exact_match"]
    assert asked(config(), tasks.of(config())) == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data__metric": "rogue"}, r"unknown metric 'rogue'\. Did you mean 'rouge'"),
        ({"data__metric": "perplexity"}, "judges no answers. Give some of exact_match, f1, rouge"),
        ({"data__metric": "pass"}, "run.execute_code=true"),
        ({"data__metric": "f1", "model__task": "sequence-classification"}, "'sequence-classification' has none"),
        ({"run__generate": 2, "model__task": "sequence-classification"}, "run.generate = 2"),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused_by_name(settings: dict[str, object], said: str) -> None:
    wanted = config(**settings)
    with pytest.raises(ConfigError, match=said):
        asked(wanted, tasks.of(wanted))


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft.tasks.metrics.find_spec", lambda name: None)
    wanted = config(data__metric="bleu")
    with pytest.raises(ConfigError, match=r"sacrebleu: pip install 'fedpeft\[metrics\]'"):
        asked(wanted, tasks.of(wanted))


def test_rows_that_were_not_asked_count_for_nothing_and_a_group_of_them_has_no_score() -> None:
    marks = {"exact_match": np.array([[1.0], [np.nan], [0.0], [np.nan]])}
    scores = Scores(np.ones(4), np.ones(4), (find("loss"),)).judged(marks)
    assert scores.metrics() == {"loss": 1.0, "exact_match": 0.5}
    assert scores.by_group(("a", "b", "a", "b")) == {"a": {"loss": 1.0, "exact_match": 0.5}, "b": {"loss": 1.0}}
