"""A configuration file to begin one's own from: every key, what it means, what it may be and what it is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fedpeft.config.run import RunConfig
from fedpeft.config.train import TrainConfig
from fedpeft.training.optimizers import OPTIMIZERS

WIDTH = 100
HEADER = """\
# A configuration of fedpeft, to be run by `fedpeft simulate FILE`. What stands behind a # is not set: it shows the
# default, or nothing where there is none. Take the # away to set it.
"""


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Parameters
    ----------
    name : str
        Without its section.
    facts : mapping
        Its JSON schema.
    known : mapping
        The schemas that this one refers to.
    required : bool
        Whether it has no default.
    """

    name: str
    facts: Mapping[str, Any]
    known: Mapping[str, Any]
    required: bool

    @property
    def default(self) -> Any:
        """What it is where nobody says."""
        return self.facts.get("default")

    @property
    def description(self) -> str:
        """What it means."""
        return str(self.facts.get("description", ""))

    @property
    def allowed(self) -> str:
        """What it may be, in a few characters."""
        return _allowed(self.facts, self.known)

    @property
    def choices(self) -> list[str]:
        """The names that it may be, where it is a choice of names."""
        several = [self.facts, *self.facts.get("anyOf", ())]
        return [str(name) for facts in several for name in facts.get("enum", ())]


def keys_of(model: type[BaseModel]) -> list[Key]:
    """Return the keys of a section, or of a method's or optimiser's options."""
    schema = model.model_json_schema()
    required, known = schema.get("required", ()), schema.get("$defs", {})
    return [Key(name, facts, known, name in required) for name, facts in schema.get("properties", {}).items()]


def keys() -> dict[str, Key]:
    """Return all keys by ``section.key``, those of all optimisers with them; those of strategies are theirs."""
    by_name: dict[str, Key] = {}
    for section, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type)
        options = [each.options for each in OPTIMIZERS.all().values()] if field.annotation is TrainConfig else []
        by_name |= {f"{section}.{key.name}": key for model in (field.annotation, *options) for key in keys_of(model)}
    return by_name


def commented(config: RunConfig, options: BaseModel) -> str:
    """Render a configuration as TOML with all that could be set besides, which resolves to the same.

    Parameters
    ----------
    config : RunConfig
        What is set.
    options : BaseModel
        The strategy's options, as the strategy has parsed them.
    """
    blocks = [HEADER]
    for section in RunConfig.model_fields:
        part: BaseModel = getattr(config, section)
        parts = [part, *{"train": [config.train.options], "strategy": [options]}.get(section, [])]
        lines = [f"# {textwrap.dedent(part.__doc__ or '').strip().splitlines()[0]}", f"[{section}]"]
        for each in parts:
            values = each.model_dump(mode="json")
            shown = [key for key in keys_of(type(each)) if key.name in values]  # an adapter lacks what its kind has not
            for key in shown:
                lines += _entry(key, values.pop(key.name), key.name in part.model_fields_set)
            if each is part and len(parts) == 1:  # what is left are options that PEFT describes
                lines += [f"{name} = {_toml(value)}" for name, value in values.items()]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _entry(key: Key, value: Any, named: bool) -> Iterable[str]:
    yield from textwrap.wrap(
        f"{key.description} ({key.allowed})", WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    if value is None:
        yield f"#{key.name} ="
    else:
        yield f"{'' if named else '#'}{key.name} = {_toml(value)}"


def _toml(value: Any) -> str:
    import tomli_w

    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return tomli_w.dumps({"_": value}).removeprefix("_ = ").rstrip("\n")


def _allowed(facts: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Say in a few characters what a JSON schema allows."""
    if "$ref" in facts:
        return _allowed(known.get(str(facts["$ref"]).rpartition("/")[2], {}), known)
    if "anyOf" in facts:
        return " or ".join(_allowed(each, known) for each in facts["anyOf"])
    if "enum" in facts:
        return " | ".join(str(value) for value in facts["enum"])
    if "const" in facts:
        return str(facts["const"])
    limits = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {facts[limit]:g}" for limit, sign in limits if limit in facts]
    kinds = {"null": "unset", "integer": "whole number", "string": "text", "boolean": "true or false", "array": "list"}
    kind = str(facts.get("type", "any"))
    return " ".join([kinds.get(kind, kind), ", ".join(bounds)]).strip()
