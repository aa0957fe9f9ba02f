"""Libraries that PEFT and transformers import as soon as they are installed, kept back until a run needs them.

bitsandbytes and torchao bring torch's compiler along: together they take about a fifth of the processor time that a
client's process needs until it has its first adapter, and 50 MB. A run that holds nothing in fewer bits gains nothing
by it. So in the processes that are fedpeft's own (the command line, its workers, what Flower starts for an app) they
are hidden in the way that Python has for it, as None in `sys.modules`, which looks to everybody as if they were not
installed. A program that imports fedpeft finds everything as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple


class Deferred(NamedTuple):
    """What others keep in mind of a library that was not there as they looked."""

    answers: tuple[str, ...]  # functions that remember whether it is installed, as module:function
    modules: tuple[str, ...]  # that have taken names from it as they were imported, or had not found it


DEFERRED = {
    "bitsandbytes": Deferred(
        (
            "transformers.utils.import_utils:is_bitsandbytes_available",
            "peft.import_utils:is_bnb_available",
            "peft.import_utils:is_bnb_4bit_available",
        ),
        ("transformers.integrations.bitsandbytes", "peft.helpers"),
    ),
    "torchao": Deferred(
        (
            "transformers.utils.import_utils:is_torchao_available",
            "peft.import_utils:is_torchao_available",
            "peft.import_utils:is_torchao_ge_v0_18_0",
        ),
        ("transformers.integrations.torchao", "transformers.quantizers.quantizer_torchao"),
    ),
}
# what Flower has loaded in the processes that it starts for an app, and in no other program
FLOWERS_OWN = {"flwr.supernode.cli.flwr_clientapp", "flwr.superlink.cli.flwr_serverapp"}

_needed: set[str] = set()


def defer(besides: Collection[str] = ()) -> None:
    """Keep the libraries back in this process, which must be one of fedpeft's own; call it before all imports.

    Parameters
    ----------
    besides : collection of str
        Those that are known to be needed.
    """
    if {"transformers", "peft"} & sys.modules.keys():
        return  # which have looked for them already
    modules: dict[str, Any] = sys.modules
    for library in DEFERRED.keys() - _needed - {*besides}:
        modules.setdefault(library, None)


def need(libraries: Iterable[str] = tuple(DEFERRED)) -> None:
    """Let libraries be imported from now on, by everybody in this process; any others are there anyway."""
    modules: dict[str, Any] = sys.modules
    for library in DEFERRED.keys() & {*libraries}:
        _needed.add(library)
        if library not in modules or modules[library] is not None:
            continue
        del modules[library]
        for answer in DEFERRED[library].answers:
            module, _, function = answer.partition(":")
            remembers: Any = getattr(modules.get(module), function, None)
            if hasattr(remembers, "cache_clear"):
                remembers.cache_clear()
        for name in DEFERRED[library].modules:
            if name in modules:
                importlib.reload(modules[name])  # in place: what others have of it finds the names too


def needed() -> tuple[str, ...]:
    """Return the libraries kept back at first that something in this process has asked for."""
    return tuple(library for library in DEFERRED if library in _needed)


def installed(library: str) -> bool:
    """Tell whether a library that is needed now is installed; it may be imported from now on if so."""
    need([library])
    return importlib.util.find_spec(library) is not None
