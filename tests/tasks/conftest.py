from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedpeft.data import tokens
from tests.tasks.rows import LABELS, TEXTS, write_csv


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPEFT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rows_csv(tmp_path: Path) -> Path:
    columns: dict[str, Sequence[object]] = {
        "text": TEXTS,
        "label": LABELS,
        "place": ["north", "south", "east"] * 10,
        "who": [11, 2] * 15,
    }
    return write_csv(tmp_path / "rows.csv", columns)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are tokenised."""
    sizes: list[int] = []
    original = tokens.tokenise

    def counted(tokenizer: Any, batch: Any, *how: Any) -> tokens.Tokens:
        if "row" in batch:  # else some once more, to see what they lost
            sizes.append(len(batch["row"]))
        return original(tokenizer, batch, *how)

    monkeypatch.setattr(tokens, "tokenise", counted)
    return sizes


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder with a tokenizer of whole words and single characters of white space."""
    vocabulary = ["[UNK]", "<s>", "</s>", "user", "bot", ":", "\n", *(f"{kind}{i}" for kind in "pc" for i in range(30))]

    def make(template: str | None = None, **special: str) -> Path:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(" ", "removed"),
                pre_tokenizers.Split("\n", "isolated"),
                pre_tokenizers.Split(":", "isolated"),
            ]
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)
        fast.chat_template = template
        folder = tmp_path_factory.mktemp("words")
        fast.save_pretrained(folder)
        return folder

    return make
