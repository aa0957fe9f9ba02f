"""Prompts and completions as tokens, of which the loss counts some."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fedpeft.data.splits import EncodedSplit
from fedpeft.errors import ModelError
from fedpeft.tasks.encoding import encode, encode_rows
from tests.tasks.rows import configure

TEMPLATE = (
    "{% for turn in messages %}{{ 'user' if turn.role == 'user' else 'bot' }}:{{ turn.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def decoded(folder: Path, split: EncodedSplit) -> list[tuple[list[str], list[str]]]:
    """Return the words of each row: those that the loss ignores, and those that it counts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    batch = split.batch(range(len(split)))
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        counted = labels != -100
        assert torch.equal(labels[counted], ids[counted])
        assert not bool((counted & (mask == 0)).any())
        ignored = ids[(mask == 1) & ~counted]
        rows.append((tokenizer.convert_ids_to_tokens(ignored), tokenizer.convert_ids_to_tokens(ids[counted])))
    return rows


def pairs_file(tmp_path: Path, sizes: Sequence[tuple[int, int]]) -> tuple[Path, list[tuple[list[str], list[str]]]]:
    pairs = [([f"p{i}" for i in range(p)], [f"c{i}" for i in range(c)]) for p, c in sizes]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": " ".join(p), "completion": " ".join(c)}) + "\n" for p, c in pairs))
    return path, pairs


SIZES = [(1, 1), (4, 2), (2, 5), (9, 3), (12, 12), (3, 20)]


@pytest.mark.parametrize("max_length", [8, 64])
@pytest.mark.parametrize("templated", [False, True])
def test_the_loss_counts_the_completion_and_its_end_token_only(
    tmp_path: Path, words: Callable[..., Path], max_length: int, templated: bool
) -> None:
    path, pairs = pairs_file(tmp_path, SIZES)
    folder = words(TEMPLATE if templated else None, eos_token="</s>")
    config = configure(path, model__task="causal-lm", data__max_length=max_length, data__truncate="prompt")
    split = encode_rows(config, folder, path)
    for (ignored, counted), (prompt, completion) in zip(decoded(folder, split), pairs, strict=True):
        tail = [*completion, "</s>"]
        if templated:  # who speaks, and in which order, stays whatever gives way
            room = max(max_length - len(tail) - 6, 0)
            head = ["user", ":", *prompt[max(len(prompt) - room, 0) :], "</s>", "\n", "bot", ":"]
        else:
            room = max(max_length - len(tail), 0)
            head = [*prompt, "\n"][max(len(prompt) + 1 - room, 0) :]
        assert counted == tail[: max_length - len(head)]
        assert ignored == head


def test_a_start_token_comes_first_where_the_tokenizer_adds_one(tmp_path: Path, words: Callable[..., Path]) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = words(None, eos_token="</s>", bos_token="<s>")
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    saved.save(str(folder / "tokenizer.json"))
    path, _ = pairs_file(tmp_path, [(2, 1)])
    split = encode_rows(configure(path, model__task="causal-lm"), folder, path)
    assert decoded(folder, split) == [(["<s>", "p0", "p1", "\n"], ["c0", "</s>"])]


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tmp_path: Path, words: Callable[..., Path]) -> None:
    path, _ = pairs_file(tmp_path, SIZES)
    data = encode(configure(path, model__task="causal-lm"), words(None, eos_token="</s>"))
    assert data.pad_token_id == data.train.pad_token_id == 2
    assert (data.labels, data.train.labels) == ((), None)
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        encode(configure(path, model__task="causal-lm"), words(None))


def test_a_chat_template_that_refuses_plain_turns_is_a_clear_error(tmp_path: Path, words: Callable[..., Path]) -> None:
    path, _ = pairs_file(tmp_path, SIZES)
    folder = words("{{ raise_exception('no such role') }}", eos_token="</s>")
    with pytest.raises(ModelError, match=r"chat template refuses .* no such role"):
        encode(configure(path, model__task="causal-lm"), folder)
