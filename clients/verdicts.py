"""What a simulation's driver decided about a message, handed to the client in its own process.

A SuperNode's configuration is the site's, a message and a run's configuration are the server's: whoever writes them
must not be able to say that a training is on the books already. So this travels beside all three, in a variable of the
process that only the code which calls the ClientApp can set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Of one message under record-level privacy.

    Parameters
    ----------
    allowed : bool
        Whether the budget allows the training, which is then on the driver's books.
    noise_multiplier : float
        What was charged, and hence must be trained with.
    """

    allowed: bool
    noise_multiplier: float = 0.0


_simulated: ContextVar[bool] = ContextVar("simulated", default=False)
_verdict: ContextVar[Verdict | None] = ContextVar("verdict", default=None)


@contextlib.contextmanager
def simulated(verdict: Verdict | None) -> Iterator[None]:
    """Run a block as a client of a simulation, whose driver keeps the books."""
    here, told = _simulated.set(True), _verdict.set(verdict)
    try:
        yield
    finally:
        _verdict.reset(told)
        _simulated.reset(here)


def is_simulated() -> bool:
    """Tell whether this is a client of a simulation rather than of a site."""
    return _simulated.get()


def verdict() -> Verdict | None:
    """Return what the driver decided about the message at hand; None on a SuperNode."""
    return _verdict.get()
