"""What can go wrong in a way that a user can mend: one class per cause.

Each message says what was given, what is allowed and what to do. The command line prints it as one line and exits with
code 2; no traceback, because the cause lies outside this package's code.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class FedpeftError(Exception):
    """Base of every error that the command line prints as one line."""

    exit_code = 2
    # whether its text speaks of settings, model and numbers of rows alone, and so may be shown where rows are private
    quotes_no_row = False

    def __str__(self) -> str:
        return escaped(super().__str__())


class ConfigError(FedpeftError):
    """A key, value, strategy or preset that does not exist or is out of range."""


class DataError(FedpeftError):
    """Rows that cannot be read, or that do not hold what the configuration names."""


class PartitionError(FedpeftError):
    """Rows that cannot be divided among the clients as asked."""


class ModelError(FedpeftError):
    """A base model that cannot be loaded."""


class AdapterError(FedpeftError):
    """An adapter that does not fit the base model."""

    quotes_no_row = True


class RunDirectoryError(FedpeftError):
    """A run directory that exists already, is no run, or cannot be written."""


class CheckpointError(RunDirectoryError):
    """A checkpoint that is not as it was written; the one before it may be."""


class SimulationError(FedpeftError):
    """Workers that cannot be started."""


class DeploymentError(FedpeftError):
    """A federation of real nodes that cannot start."""


class MessageError(FedpeftError):
    """A message between server and client that lacks something, or holds what it must not."""

    quotes_no_row = True


class PrivacyError(FedpeftError):
    """A privacy statement that cannot be made: a budget that no noise can meet, or a mechanism that does not fit."""

    quotes_no_row = True


class LedgerError(FedpeftError):
    """A privacy ledger that is damaged, held by another process, or cannot be written: nobody may train without it."""


class TooFewClientsError(FedpeftError):
    """A round to which fewer clients answered than `federation.min_clients`; what was done before it is saved."""

    exit_code = 1


class BudgetSpentError(FedpeftError):
    """A privacy budget that allows no next step, in a run that is to end then; what was done before it is saved."""

    exit_code = 1


class Interruption(KeyboardInterrupt):
    """A signal that asks the process to end; no error, and nobody's who catches errors.

    Parameters
    ----------
    signal : int
        Its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.exit_code = 128 + signal  # as shells have it


def escaped(text: str) -> str:
    r"""Write line ends and control characters as their escapes, as \n: names of columns and labels may hold any.

    Parameters
    ----------
    text : str
        A message.
    """
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Say which allowed name is meant most likely, then all of them.

    Parameters
    ----------
    given : str
        What the user wrote.
    allowed : iterable of str
        The names that exist.

    Returns
    -------
    str
        ``"did you mean 'x'? Allowed: a, b, x"``, or only the second half where nothing is near.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5) or [name for name in names if given in name]
    listing = f"Allowed: {', '.join(names)}." if names else "Nothing is allowed here."
    return f"Did you mean '{close[0]}'? {listing}" if close else listing
