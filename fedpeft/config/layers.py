"""The layers that a configuration is made of: defaults < preset < TOML file < command line."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedpeft.adapters.kinds import KINDS
from fedpeft.config.adapter import AdapterConfig
from fedpeft.config.run import RunConfig
from fedpeft.config.values import Scalar, describe
from fedpeft.data import layouts
from fedpeft.data.formats import first_rows, implied_columns, training_place
from fedpeft.errors import ConfigError, nearest
from fedpeft.places import at, divided_name
from fedpeft.presets import layer as preset_layer

Layer = dict[str, dict[str, Any]]
# keys of one section of which naming one takes back what an earlier layer said of the others
EXCLUSIVE = {
    "train": ("local_steps", "local_epochs"),
    "partition": ("scheme", "by"),
    "adapter": ("rank", "ranks"),
}


def nest(flat: Mapping[str, Any]) -> Layer:
    """Turn ``{"section.key": value}`` into ``{"section": {"key": value}}``."""
    layer: Layer = {}
    for name, value in flat.items():
        section, dot, key = name.partition(".")
        if not dot or not key:
            raise ConfigError(f"'{name}' is not of the form section.key. {nearest(section, RunConfig.model_fields)}")
        layer.setdefault(section, {})[key] = value
    return layer


def parse_overrides(words: Iterable[str]) -> Layer:
    """Read the command line's ``section.key=value`` words."""
    flat: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(
                f"'{word}' is neither a .toml file nor section.key=value, such as train.learning_rate=1e-3."
            )
        flat[name.strip()] = value.strip()
    return nest(flat)


def read_toml(path: Path) -> Layer:
    """Read a configuration file."""
    try:
        with path.open("rb") as file:
            layer = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file '{path}'; name an existing .toml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read '{path}': {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}") from None
    for section, table in layer.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"'{section}' stands outside a section in '{path}'. Write it as section.key, or under [section]."
            )
    return layer


def merge(layers: Iterable[Layer]) -> Layer:
    """Lay one layer over another: later ones win, key by key."""
    merged: Layer = {}
    for layer in layers:
        for section, table in layer.items():
            into = merged.setdefault(section, {})
            if not table.keys().isdisjoint(EXCLUSIVE.get(section, ())):
                for key in EXCLUSIVE[section]:
                    into.pop(key, None)
            # a strategy's options belong to it alone: naming another one drops them
            if section == "strategy" and "name" in into and table.get("name", into["name"]) != into["name"]:
                into.clear()
            if section == "adapter" and table.get("kind", into.get("kind", "lora")) != into.get("kind", "lora"):
                _leave_to_the_kind(into, str(table["kind"]))
            into.update(table)
    return merged


def _leave_to_the_kind(adapter: dict[str, Any], kind: str) -> None:
    """Drop what an earlier layer said of another kind: its options, and what this one has no use for."""
    facts = KINDS.find(kind)
    own = AdapterConfig.model_fields.keys() - facts.lacks - ({"targets"} if facts.choose else set())
    for name in adapter.keys() - own:
        del adapter[name]


def resolve(layers: Iterable[Layer]) -> RunConfig:
    """Merge layers over the defaults and check the result.

    Raises
    ------
    ConfigError
        An unknown section or key, a value of the wrong type or out of range, or values that contradict each other.
    """
    merged = merge(layers)
    for section, table in merged.items():
        if section not in RunConfig.model_fields:
            raise ConfigError(f"unknown section '{section}'. {nearest(section, RunConfig.model_fields)}")
        kind = RunConfig.model_fields[section].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        if kind.model_config.get("extra") == "allow":  # it checks its options itself
            continue
        for key in table:
            if key not in kind.model_fields:
                raise ConfigError(f"unknown key '{section}.{key}'. {nearest(key, kind.model_fields)}")
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def from_flat(flat: Mapping[str, Scalar]) -> RunConfig:
    """Read what `RunConfig.to_flat` wrote; keys of other programs in the same table are an error too."""
    return resolve([nest(flat)])


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make paths of existing files and folders absolute, so that a saved configuration works from any folder.

    Where no column is named, those are that the format of the rows has, or their layout where such rows can be for
    language models only; from either follows the task.
    """

    def absolute(value: str | None) -> str | None:
        if not value:
            return value
        name, parts = divided_name(value)
        path = at(name)
        return ":".join([str(path.resolve()), *parts]) if os.path.exists(path) else value

    data, template = config.data, config.data.template or ""
    named = (data.text, data.image, data.prompt, data.completion, data.messages, data.layout)
    if config.model.task is None and not any(named):
        source = data.source or data.test
        implied = dict(implied_columns(source)) or _implied_layout(source, data.encoding)
        config = config.model_copy(update={"data": data.model_copy(update=implied)})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": absolute(config.model.name)}),
            "adapter": config.adapter.model_copy(
                update={"init_data": absolute(config.adapter.init_data), "start": absolute(config.adapter.start)}
            ),
            "data": config.data.model_copy(
                update={
                    "source": absolute(config.data.source),
                    "test": absolute(config.data.test),
                    # a folder may be called like a template that has a name
                    "template": absolute(template) if Path(template).suffix else config.data.template,
                }
            ),
        }
    )


def _implied_layout(source: str | None, encoding: str) -> dict[str, str]:
    """Return the layout of a file or folder of rows that only language models can read."""
    place = None if not source else training_place(source)
    found = None if place is None else layouts.implied(first_rows(place, encoding, layouts.LOOKED_AT))
    return {} if found is None else {"layout": found}


def configure(settings: Mapping[str, Any], *, preset: str | None = None, file: Path | None = None) -> RunConfig:
    """Make a configuration in Python, as the command line makes it from words.

    Parameters
    ----------
    settings : mapping
        ``{"section.key": value}``; wins over file and preset.
    preset : str, optional
        Name of an embedded preset.
    file : Path, optional
        A TOML file.

    Raises
    ------
    ConfigError
        See `resolve`.
    """
    layers = [preset_layer(preset)] if preset else []
    layers += [read_toml(file)] if file else []
    return with_absolute_paths(resolve([*layers, nest(settings)]))
