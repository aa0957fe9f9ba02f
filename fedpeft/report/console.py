"""Where a run's lines go: a reader that goes away, or a full disk behind a redirection, ends the output alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from fedpeft.jsons import to_json
from fedpeft.runs import Event


class RunConsole(Console):
    """A console whose reader may go away without ending the program."""

    def on_broken_pipe(self) -> None:
        """Fall silent; rich would exit."""
        self.quiet = True
        discard(self.file)

    def say(self, text: RenderableType) -> None:
        """Print, a text on one line however long; fall silent where nothing can be written any more."""
        if isinstance(text, Text):
            # an encoding that lacks a client id's letters must not end the run
            plain = text.plain.encode(self.encoding, "backslashreplace").decode(self.encoding)
            if plain != text.plain:
                text = Text(plain, text.style)
        try:
            self.print(text, soft_wrap=not self.is_interactive, highlight=False)
        except OSError:
            self.quiet = True
            discard(self.file)


def discard(file: Any) -> None:
    """Point a dead standard stream at nothing, so that the flush at the interpreter's exit does not fail."""
    try:
        descriptor = file.fileno()
    except (AttributeError, OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def open_console(*, stderr: bool = False) -> RunConsole:
    """Return a console on stdout or stderr; interactive on a terminal only, whatever FORCE_COLOR says."""
    stream = sys.stderr if stderr else sys.stdout
    return RunConsole(stderr=stderr, force_interactive=None if stream.isatty() else False)


class JsonListener:
    """Prints each event as one line of JSON, and nothing else.

    The lines are strict JSON: a loss that diverged is null, since JSON knows neither NaN nor infinity.

    Parameters
    ----------
    stream : text stream, optional
        Where to; stdout if not given.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = stream if stream is not None else sys.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def recall(self, events: Iterable[Event]) -> None:
        """Print nothing of what a run that goes on has printed before."""

    def finish(self, run: Path) -> None:
        """Print nothing: the end was an event."""

    def __call__(self, event: Event) -> None:
        """Print one event and flush."""
        if self._stream is None:
            return
        try:
            print(to_json(event), file=self._stream, flush=True)
        except OSError:
            discard(self._stream)
            self._stream = None
