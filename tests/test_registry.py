"""Things of other packages that cannot be had: they are named where they are asked for, and stop nobody else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedpeft.adapters.kinds import KINDS
from fedpeft.cli.completion import complete_word
from fedpeft.errors import ConfigError
from fedpeft.strategies import registry
from fedpeft.training.optimizers import OPTIMIZERS

THEIRS = """
[fedpeft.adapters]
gone = there_is_no_such_module:KIND
half = half_kind:KIND
number = half_kind:NUMBER
other = half_kind:OTHER
lora = half_kind:NUMBER
[fedpeft.optimizers]
gone = there_is_no_such_module:OPTIMIZER
[fedpeft.strategies]
number = half_kind:NUMBER
"""
SOURCE = """
from fedpeft.adapters.kinds import Kind

NUMBER = 3
OTHER = Kind(name="another", config="IA3Config", update="linear", parts=("ia3_",), rank=())
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package whose entry points lead nowhere."""
    about = tmp_path / "half_kind-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: half-kind\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(THEIRS)
    (tmp_path / "half_kind.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (
            "gone",
            "there_is_no_such_module:KIND, which half-kind adds under that name, cannot be loaded (ModuleNotFound",
        ),
        ("half", "cannot be loaded (AttributeError: module 'half_kind' has no attribute 'KIND')"),
        ("number", "half_kind:NUMBER, which half-kind adds under that name, is no adapter.kind; mend or uninstall"),
        ("other", "calls itself 'another'"),
    ],
)
def test_what_cannot_be_had_of_another_package_is_named_with_its_package(broken: None, name: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(wrong)) as error:
        KINDS.find(name)
    assert "\n" not in str(error.value)


def test_what_cannot_be_had_takes_nothing_else_down(broken: None) -> None:
    assert KINDS.all() == KINDS.ours
    assert OPTIMIZERS.all() == OPTIMIZERS.ours
    assert registry.available() == registry.STRATEGIES
    assert KINDS.find("lora") is KINDS.ours["lora"]
    assert complete_word("train.optimizer=s") == ["train.optimizer=sgd"]


def test_a_class_of_another_package_must_be_a_strategy(broken: None) -> None:
    with pytest.raises(ConfigError, match="half_kind:NUMBER, which half-kind adds under that name, is no strategy;"):
        registry.find("number")
