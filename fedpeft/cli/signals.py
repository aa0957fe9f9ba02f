"""Ctrl-C and SIGTERM: the first ends a command in good order, the second at once."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from fedpeft.errors import Interruption

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable(then: Callable[[], str] = str) -> Iterator[None]:
    """Turn the first signal into `Interruption`, and exit as shells expect where nobody has taken it up.

    A signal that is ignored, as Ctrl-C is in the background, stays so. What `then` returns is the last line.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Interruption(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except Interruption as interruption:
        print("\n".join(filter(None, ("interrupted", then()))), file=sys.stderr)
        raise typer.Exit(interruption.exit_code) from None
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:  # else one came: the next kills, whatever is still to be written
                signal.signal(number, handler)
