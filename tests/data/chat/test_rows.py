"""Conversations as tokens: which count, held against masks written by hand and against TRL's."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from fedpeft.config import DataConfig, configure, resolve
from fedpeft.data.chat.rows import Row, RowEncoder
from fedpeft.data.chat.templates import TEMPLATES, chosen
from fedpeft.data.tokens import end_tokens
from fedpeft.errors import ConfigError, DataError, ModelError
from tests.data.chat.styles import STYLES, Style, Turn, letters, talk

MARKED = "{% generation %}"


def encoded(tokenizer: Any, turns: Sequence[Turn], max_length: int = 4096, completion: int = 0, **how: Any) -> Row:
    cell = json.dumps({"messages": list(turns), "completion": completion}, ensure_ascii=False)
    (row,) = RowEncoder(tokenizer, max_length, **how).rows({"conversation": [cell]}, ["row 1"])
    return row


def told(tokenizer: PreTrainedTokenizerFast, row: Row) -> list[str]:
    """Return the stretches of text that count."""
    found, before = [], False
    for token, counts in zip(row.ids.tolist(), row.counted.tolist(), strict=True):
        if counts and not before:
            found.append([])
        if counts:
            found[-1].append(token)
        before = counts
    return [tokenizer.decode(run) for run in found]


def expected(tokenizer: PreTrainedTokenizerFast, style: Style, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Return the tokens and the mask that were written by hand, up to the last one that counts."""
    if not style.systems and turns[0]["role"] == "system":
        first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        turns = [first, *turns[2:]]
    ids: list[int] = []
    mask: list[bool] = []
    for text, counts in style.parts(turns):
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        mask += [counts] * len(part)
    end = len(mask) - mask[::-1].index(True)
    return ids[:end], mask[:end]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
@pytest.mark.parametrize("system", [False, True])
def test_all_answers_count_and_nothing_else_does(style: Style, system: bool) -> None:
    tokenizer = letters(style.template, style.eos)
    for answers in range(1, 6):
        turns = talk(answers, system=system)
        row = encoded(tokenizer, turns)
        assert (row.ids.tolist(), row.counted.tolist()) == expected(tokenizer, style, turns)
        assert row.reference == turns[-1]["content"]
        assert row.counted[row.answer]
        assert row.folded == (system and not style.systems)
        last = encoded(tokenizer, turns, train_on="last")
        assert last.counted.tolist() == [at >= row.answer for at in range(len(row.ids))]
        assert encoded(tokenizer, turns, train_on="all").counted.all()
        assert encoded(tokenizer, turns, completion=1, train_on="completion").counted.tolist() == last.counted.tolist()


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_a_model_that_answers_is_given_what_stands_before_the_answer(style: Style) -> None:
    tokenizer = letters(style.template, style.eos)
    turns = talk(3)
    row = encoded(tokenizer, turns)
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    assert row.ids[: row.answer].tolist() == prompt
    assert int(row.ids[-1]) in end_tokens(tokenizer)
    assert end_tokens(tokenizer)[0] == tokenizer.eos_token_id


def test_thinking_that_the_template_drops_from_earlier_turns_is_not_sought_there() -> None:
    style = next(each for each in STYLES if each.name == "qwen3")
    tokenizer = letters(style.template, style.eos)
    turns = talk(3)
    for turn in turns[1::2]:
        turn["content"] = "<think>\nhm\n</think>\n\n" + turn["content"]
    row = encoded(tokenizer, turns)
    assert (row.ids.tolist(), row.counted.tolist()) == expected(tokenizer, style, turns)
    assert told(tokenizer, row)[-1].startswith("<think>\nhm")


TRAINING = ("llama3", "qwen3", "qwen2_5", "gemma", "phi3", "glm4moe", "cohere")


@pytest.mark.parametrize("name", [*TRAINING, *(f"ours:{name}" for name, each in TEMPLATES.ours.items() if each.text)])
def test_ids_and_masks_are_those_of_trl_where_the_template_marks_answers(name: str) -> None:
    if name.startswith("ours:"):
        template = TEMPLATES.find(name.removeprefix("ours:")).text
        assert template is not None
    else:
        folder = Path(trl.__file__).parent / "chat_templates"
        template = (folder / f"{name}_training.jinja").read_text(encoding="utf-8")
    tokenizer = letters(template)
    for answers in range(1, 6):
        turns = talk(answers, system=name != "gemma" and answers % 2 == 0)
        theirs = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        row = encoded(tokenizer, turns)
        extra = len(row.ids) - len(theirs["input_ids"])
        assert row.ids[: len(row.ids) - extra].tolist() == theirs["input_ids"]
        # where the template writes no end of turn that is a token, ours alone is taught one
        assert row.ids[len(row.ids) - extra :].tolist() == [tokenizer.eos_token_id] * extra
        assert extra == (not RowEncoder(tokenizer, 9).renderer.stops)  # type: ignore[union-attr]
        mask = row.counted[: len(row.ids) - extra].astype(int).tolist()
        assert mask == theirs["assistant_masks"]


def test_the_end_of_turn_is_taught_where_the_template_marks_the_words_alone() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = letters(template)
    row = encoded(tokenizer, talk(2))
    assert told(tokenizer, row) == ["It is 0.\nSo it is.<|im_end|>", "yes 1, naïve<|im_end|>"]
    bare = letters("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    # it opens no answers: a model must write who speaks as well
    assert told(bare, encoded(bare, talk(2))) == ["assistant: It is 0.\nSo it is.", "assistant: yes 1, naïve</s>"]


def test_a_row_without_a_template_is_prompt_line_break_completion() -> None:
    tokenizer = letters(None)
    row = encoded(tokenizer, talk(1, system=True))
    assert tokenizer.decode(row.ids) == "Be brief, assistant.\nWhat is 0 and yes 0?\nIt is 0.\nSo it is.</s>"
    assert told(tokenizer, row) == ["It is 0.\nSo it is.</s>"]
    with pytest.raises(DataError, match=r"row 1 .* alpaca, vicuna, chatml, none or a FILE\.jinja"):
        encoded(tokenizer, talk(2))


def test_raw_text_counts_wholly_and_ends_with_the_end_token() -> None:
    tokenizer = letters(None)
    (row,) = RowEncoder(tokenizer, 6).rows({"text": ["abc"]}, ["row 1"])
    assert tokenizer.decode(row.ids) == "abc</s>"
    assert row.counted.all()
    (row,) = RowEncoder(tokenizer, 6).rows({"text": ["abcdefgh"]}, ["row 1"])
    assert (tokenizer.decode(row.ids), row.cut, row.lost) == ("abcdef", 3, {"text"})


def test_a_turn_of_weight_nought_is_not_taught() -> None:
    tokenizer = letters(STYLES[0].template)
    turns: list[Any] = talk(2)
    turns[1]["weight"] = 0
    assert told(tokenizer, encoded(tokenizer, turns)) == ["yes 1, naïve<|im_end|>"]
    assert told(tokenizer, encoded(tokenizer, turns, completion=3, train_on="completion")) == ["yes 1, naïve<|im_end|>"]
    turns[3]["weight"] = 0
    assert not encoded(tokenizer, turns, train_on="last").counts
    assert encoded(tokenizer, turns, train_on="all").counts
    assert not encoded(letters(None), turns[2:]).counts


def test_what_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    mistral = letters(next(each for each in STYLES if each.name == "mistral").template)
    user = {"role": "user", "content": "a"}
    with pytest.raises(
        DataError, match=r"row 1 is a conversation that the chat template refuses: roles must alternate"
    ):
        encoded(mistral, [user, user, {"role": "assistant", "content": "b"}])
    with pytest.raises(ModelError, match=r"chat template refuses .* no such role"):
        RowEncoder(letters("{{ raise_exception('no such role') }}"), 9)
    with pytest.raises(DataError, match=r"names no completion, which data\.train_on = 'completion' counts alone"):
        encoded(mistral, talk(1), train_on="completion")
    loud = letters("{% for m in messages %}{{ (m.content | upper) + '</s>' }}{% endfor %}")
    assert told(loud, encoded(loud, [user, {"role": "assistant", "content": "b"}])) == ["B</s>"]
    with pytest.raises(ConfigError, match=r"chat template 'vicunia'|'vicunia'"):
        chosen(DataConfig(template="vicunia"))
    with pytest.raises(ConfigError, match=r"none\.jinja' cannot be read"):
        chosen(DataConfig(template=str(tmp_path / "none.jinja")))
    (tmp_path / "own.jinja").write_text(" \n")
    with pytest.raises(ConfigError, match=r"own\.jinja' is empty"):
        chosen(DataConfig(template=str(tmp_path / "own.jinja")))
    (tmp_path / "own.jinja").write_text(MARKED, encoding="utf-8-sig")
    found = chosen(DataConfig(template=str(tmp_path / "own.jinja")))
    assert found is not None
    assert found.text == MARKED


def test_a_run_holds_the_text_of_its_templates_file_whatever_becomes_of_that(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(MARKED, encoding="utf-8")
    config = configure({"data.template": str(file)})
    file.unlink()
    assert config.data.template == MARKED
    again = chosen(resolve([tomllib.loads(config.to_toml())]).data)
    assert again is not None
    assert again.text == MARKED
    assert configure({"data.template": str(file)}).data.template == str(file)  # told when it is used


@pytest.mark.parametrize(
    ("format_", "date"), [("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d, a %A", "2024-07-26, a Friday"), ("%B", "July")]
)
def test_a_date_of_today_is_not_part_of_a_row(format_: str, date: str) -> None:
    tokenizer = letters("{{ strftime_now('" + format_ + "') }}" + STYLES[0].template)
    assert tokenizer.decode(encoded(tokenizer, talk(1)).ids).startswith(f"{date}<|im_start|>user")


@pytest.mark.parametrize(
    "start", ["\n{{ 'x' }}", "  {% if true %}{{ 'x' }}{% endif %}", "{%- if true %}\n\nx{% endif %}"]
)
def test_a_template_begins_as_it_does_in_transformers(start: str) -> None:
    tokenizer = letters(start + STYLES[0].template)
    theirs = tokenizer.apply_chat_template(talk(1), return_dict=False)
    assert encoded(tokenizer, talk(1)).ids.tolist() == theirs[:-1]  # but for the line break behind the last turn


CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("words", ["", "let me see "])
def test_an_answer_that_calls_is_taught_its_call_or_refused(words: str) -> None:
    turns: list[Any] = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": words, "tool_calls": CALL},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    tokenizer = letters(CALLING)
    assert told(tokenizer, encoded(tokenizer, turns)) == [
        words + '<call>add{"a": 1}</call><|im_end|>',
        "three<|im_end|>",
    ]
    for template in (STYLES[0].template, TEMPLATES.find("chatml").text):
        with pytest.raises(DataError, match="row 1 calls 'add' in an answer, and the chat template has no words for"):
            encoded(letters(template), turns)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_a_conversation_that_the_assistant_begins_is_read_where_the_template_writes_it(style: Style) -> None:
    tokenizer = letters(style.template, style.eos)
    turns = talk(2)[1:]
    if style.name == "mistral":
        with pytest.raises(DataError, match="roles must alternate"):
            encoded(tokenizer, turns)
        return
    ids, mask = expected(tokenizer, style, turns)
    if style.name == "llama-2":
        mask[0] = False  # the space that joins it to a user's turn, of which there is none
    row = encoded(tokenizer, turns)
    assert (row.ids.tolist(), row.counted.tolist()) == (ids, mask)


WILD = {
    "division": "{{ 1 / 0 }}",
    "a long loop": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a way out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "no Jinja": "{% for m in messages %}",
}


@pytest.mark.parametrize("what", WILD)
def test_a_template_that_raises_whatever_it_likes_is_one_line(what: str) -> None:
    with pytest.raises(ModelError, match=r"^the chat template refuses a user's and an assistant's turn: ") as caught:
        encoded(letters(WILD[what]), talk(1))
    assert "\n" not in str(caught.value)


def test_a_folder_called_like_a_template_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "own.jinja").write_text(MARKED)
    assert configure({"data.template": "alpaca"}).data.template == "alpaca"
    assert configure({"data.template": "own.jinja"}).data.template == MARKED


def test_of_several_templates_the_default_is_taken() -> None:
    several: Any = {"default": STYLES[0].template, "tool_use": "{{ 1 / 0 }}"}
    assert told(letters(None), encoded(letters(several), talk(1))) == ["It is 0.\nSo it is.<|im_end|>"]
    del several["default"]
    with pytest.raises(ModelError, match="several chat templates, of which none is called default"):
        encoded(letters(several), talk(1))
