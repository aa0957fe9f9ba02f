"""PEFT's own options of a kind, checked against the fields and types of its configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from fedpeft.adapters.kinds.kind import Kind
from fedpeft.errors import ConfigError, nearest

# fields of all of PEFT's configurations that other settings decide, and those that nobody chooses
ELSEWHERE = {
    "target_modules": "adapter.targets",
    "exclude_modules": "adapter.targets",
    "modules_to_save": "adapter.head",
    "task_type": "model.task",
    "base_model_name_or_path": "model.name",
    "revision": "model.name",
    **dict.fromkeys(("use_rslora", "use_dora"), "adapter.kind"),
}
OWN = ("peft_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config")
Option = str | int | float | bool | list[str | int | float | bool]


def typed(kind: Kind, options: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Option]:
    """Return options as PEFT's configuration has them; texts, as of a command line, are read as what they stand for.

    Parameters
    ----------
    kind : Kind
        Whose they are.
    options : mapping
        By name, as given.
    keys : iterable of str
        What else there is under ``[adapter]``, to name the nearest.

    Raises
    ------
    ConfigError
        An option that the kind does not have, that another setting decides, or of the wrong type.
    """
    if not options:
        return {}
    import peft

    config = getattr(peft, kind.config)
    hints = get_type_hints(config)
    elsewhere = ELSEWHERE | kind.set_by()
    free = {each.name for each in dataclasses.fields(config)} - {*elsewhere, *OWN}
    read = {}
    for name, value in options.items():
        if name in elsewhere and name in hints:
            raise ConfigError(f"adapter.{name} = {value!r}: {elsewhere[name]} decides it; use that in its place.")
        if name not in free:
            raise ConfigError(f"unknown key 'adapter.{name}'. {nearest(name, [*keys, *sorted(free)])}")
        read[name] = _read(name, value, hints[name])
    return read


def _read(name: str, value: Any, hint: Any) -> Option:
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else None
    problem = "takes no value that a file can hold"
    for given in (value, parts) if parts else (value,):
        try:
            read = TypeAdapter(hint).validate_python(given)
        except ValidationError as error:
            problem = error.errors(include_url=False)[-1]["msg"]
            problem = problem[0].lower() + problem[1:]
        except PydanticSchemaGenerationError:
            break
        else:
            listed = list(read) if isinstance(read, list | tuple | set) else [read]
            if any(isinstance(each, float) and not math.isfinite(each) for each in listed):
                problem = "input should be a finite number"
                break
            if all(isinstance(each, str | int | float | bool) for each in listed):
                return listed if isinstance(read, list | tuple | set) else read
            break
    raise ConfigError(f"adapter.{name} = {value!r}: {problem}.")
