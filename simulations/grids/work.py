"""Work that is no client's, such as scoring a part of the test rows: a function of a module, called with one job."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedpeft.errors import FedpeftError, SimulationError


@dataclass(frozen=True)
class Work:
    """One call.

    Parameters
    ----------
    function : str
        As ``module:attribute``.
    job : object
        Its first argument.
    shared : tuple
        Its other arguments, equal for all calls of a kind; on the way to workers, references to them.
    """

    function: str
    job: Any
    shared: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Done:
    """What came of it.

    Parameters
    ----------
    value : object
        What the function returned.
    error : FedpeftError, optional
        What it raised.
    """

    value: Any = None
    error: FedpeftError | None = None

    def result(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value


def load_function(name: str) -> Callable[..., Any]:
    """Import a function by a name of the form ``module:attribute``."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def do(function: str, job: Any, *shared: Any) -> Done:
    """Call a function; any error but ours becomes one that can travel, with its traceback as text."""
    try:
        return Done(load_function(function)(job, *shared))
    except FedpeftError as error:
        return Done(error=error)
    except Exception:
        return Done(error=SimulationError(f"{function} failed on a worker:\n{traceback.format_exc()}"))
