"""Parameters that stand for several arguments and options of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from fedpeft.cli.options import Asked, spread


@dataclass(frozen=True)
class Size:
    rows: Annotated[int, typer.Argument()]
    wide: bool = False
    unit: str = "cm"


def test_a_group_is_taken_apart_on_the_command_line_and_put_together_for_the_command() -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @spread(without={"unit"})
    def measure(size: Size, name: str = "it") -> None:
        """Measure something."""
        seen.append((size, name))

    assert CliRunner().invoke(app, ["3", "--wide", "--name", "that"]).exit_code == 0
    assert CliRunner().invoke(app, ["4"]).exit_code == 0
    assert seen == [(Size(3, True), "that"), (Size(4), "it")]
    assert CliRunner().invoke(app, ["4", "--unit", "m"]).exit_code == 2
    assert CliRunner().invoke(app, []).exit_code == 2
    assert "Measure something." in CliRunner().invoke(app, ["--help"]).stdout


def test_options_are_words_and_files_lie_below_both() -> None:
    asked = Asked(words=["train.batch_size=3"], seed=4, strategy="fedit")
    assert asked.layers() == [{"train": {"batch_size": "3"}, "strategy": {"name": "fedit"}, "run": {"seed": "4"}}]
    assert asked.config(default=None).model.name is None
    assert asked.config().model.name == "preset:digits"
    assert asked.config(["model.name=some/folder"]).train.batch_size == 16
