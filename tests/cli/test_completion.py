"""What a shell is offered, and that it is offered at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.cli.completion import complete_preset, complete_strategy, complete_word
from fedpeft.strategies import available


def test_all_strategies_are_offered() -> None:
    assert complete_strategy("") == sorted(available())
    assert complete_strategy("lora-f") == ["lora-fair"]


def test_words_are_completed_key_by_key_and_then_by_their_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").touch()
    assert complete_word("train.local") == ["train.local_epochs=", "train.local_steps="]
    assert complete_word("my") == ["my.toml"]
    assert complete_word("train.optimizer=adamw") == ["train.optimizer=adamw", "train.optimizer=adamw-8bit"]
    assert complete_word("data.truncate=p") == ["data.truncate=prompt"]
    assert complete_word("strategy.name=fedi") == ["strategy.name=fedit"]
    assert complete_word("nothing.at=") == []
    assert complete_preset("di") == ["digits"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fedpeft simulate --strategy fedi", "fedit"),
        ("fedpeft simulate train.mom", "train.momentum="),
        ("fedpeft conf", "config"),
    ],
)
def test_bash_is_answered_without_a_heavy_library(line: str, offered: str) -> None:
    asked = "import sys; sys.argv = ['fedpeft']\nfrom fedpeft.cli import main\n"
    asked += "try: main()\nexcept SystemExit: pass\n"
    asked += "print([m for m in ('torch', 'transformers', 'ray', 'flwr', 'peft') if m in sys.modules], file=sys.stderr)"
    words = {"_FEDPEFT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True, env=os.environ | words
    )
    assert done.stdout.split() == [offered]
    assert done.stderr.splitlines()[-1] == "[]"
