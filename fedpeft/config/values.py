"""Values that are not plain TOML, and what is wrong with them in words."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from fedpeft.errors import ConfigError
from fedpeft.registry import Registry

Scalar = str | int | float | bool


def split_list(value: object) -> object:
    """Read ``"query, value"`` as a list, since run configurations on the wire and command lines hold no lists."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


PATTERN = "re:"  # before a regular expression, in which commas are its own


def split_targets(value: object) -> object:
    """Read names as :func:`split_list` does, and a regular expression after ``re:`` as the one value that it is."""
    if isinstance(value, str) and value.strip().startswith(PATTERN):
        value = [value.strip()]
    names = split_list(value)
    patterns = [name for name in names if str(name).startswith(PATTERN)] if isinstance(names, list | tuple) else []
    for pattern in patterns:
        if len(cast(list[object], names)) > 1:
            raise ValueError(
                f"adapter.targets: '{pattern}' must stand alone; put what else is to be adapted into it, as in "
                f"{PATTERN}.*\\.(q_proj|v_proj)"
            )
        try:
            re.compile(str(pattern).removeprefix(PATTERN))
        except re.error as error:
            raise ValueError(f"adapter.targets = '{pattern}' is no regular expression: {error}") from None
    return names


def number_or_auto(value: object, info: ValidationInfo) -> object:
    """Read ``auto`` as a key that nobody has set: run configurations on the wire and TOML files know no None."""
    if not isinstance(value, str):
        return value
    if value == "auto":
        return None
    try:
        float(value)
    except ValueError:
        raise ValueError(f"simulation.{info.field_name} = {value!r} is neither a number nor auto") from None
    return value


def count_auto_or_off(value: object, info: ValidationInfo) -> object:
    """Read a number of at least 1, which may be written as text; leave ``auto`` and ``off`` as they are."""
    if value in ("auto", "off"):
        return value
    try:
        if not isinstance(value, bool) and (count := int(str(value))) >= 1:
            return count
    except ValueError:
        pass
    raise ValueError(f"simulation.{info.field_name} = {value!r}: give a number of at least 1, auto or off")


def join_list(value: object) -> object:
    """Read ``[0, 1, 5]`` or 5 as ``"0,1,5"`` or ``"5"``: what :func:`split_list` takes apart."""
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Joined = Annotated[str, BeforeValidator(join_list)]
Targets = Annotated[tuple[str, ...], BeforeValidator(split_targets)]
Names = Annotated[tuple[str, ...], BeforeValidator(split_list)]
Ranks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), BeforeValidator(split_list)]


@dataclass(frozen=True)
class OneOf:
    """A value that names one of a registry.

    Parameters
    ----------
    registry : Registry
        All that may be named.
    """

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the name as pydantic checks a value."""
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Say in a schema which names there are."""
        return {**handler(schema), "enum": list(self.registry.all())}

    def _known(self, name: str) -> str:
        try:
            self.registry.find(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name


def describe(error: ValidationError, prefix: str = "") -> str:
    """Say in one line what pydantic found wrong: the key, the value given, what is allowed."""
    problems = []
    for item in error.errors(include_url=False):
        name = ".".join([*([prefix] if prefix else []), *(str(part) for part in item["loc"])])
        if item["type"] == "value_error":
            problems.append(str(item["ctx"]["error"]))
        else:
            given = item["input"]
            shown = "nan" if isinstance(given, float) and math.isnan(given) else repr(given)
            problems.append(f"{name} = {shown}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(problems)
