"""The configuration of a run: one typed, frozen model, and the layers that it is made of.

Defaults < preset < TOML file < command line. Every key has a name of the form ``section.key``; what does not exist is
an error that names the nearest key that does.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedpeft.adapters.kinds import (
    INITS,
    INITS_FROM_DATA,
    INITS_OF_BASE,
    WITHOUT_DROPOUT,
    AdapterInit,
    AdapterKind,
    Head,
)
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.config.section import Section
from fedpeft.errors import ConfigError, nearest
from fedpeft.places import at, divided_name, is_image_folder

Task = Literal["sequence-classification", "image-classification", "causal-lm"]
Scalar = str | int | float | bool


def _split_list(value: object) -> object:
    """Read ``"query, value"`` as a list, since run configurations on the wire and command lines hold no lists."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split_list)]
Ranks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), BeforeValidator(_split_list)]


class ModelConfig(Section):
    """The frozen base model."""

    name: str | None = Field(None, description="a transformers folder, a hub id, or preset:NAME")
    task: Task | None = Field(None, description="what the model is for; follows from the data's columns if unset")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="run code that a hub repository brings")


Truncate = Literal["longest", "prompt", "completion"]


class DataConfig(Section):
    """The rows, and which columns hold what."""

    source: str | None = Field(
        None, description="CSV, JSON lines, Parquet, image folder, saved dataset, hub id, preset:NAME"
    )
    test: str | None = Field(None, description="test rows, same kinds; else the source's test split, else held out")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of rows held out where no test rows are given")
    text: str | None = Field(None, description="column of the text to classify")
    text_pair: str | None = Field(None, description="column of a second text, for pairs")
    image: str | None = Field(None, description="column of images to classify")
    prompt: str | None = Field(None, description="column of prompts, for causal language modelling")
    completion: str | None = Field(None, description="column of completions: the loss counts these tokens only")
    label: str | None = Field(None, description="column of the label; 'label' if unset")
    labels: str | None = Field(
        None, description="all label names, comma-separated, where a site sees only some of them"
    )
    domain: str | None = Field(None, description="column by which test scores are also reported")
    max_length: int = Field(128, ge=1, description="tokens kept of each row")
    truncate: Truncate | None = Field(
        None,
        description="what is cut of prompt and completion that are too long together: longest (if unset), the longer "
        "of both; prompt, at its beginning and wholly if need be; completion, at its end",
    )
    encoding: str = Field("utf-8", description="of CSV and JSON files, such as cp1252, latin-1, utf-16")

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names in ``labels``, or None where it is not set; quotes protect a comma in a name."""
        if self.labels is None:
            return None
        return tuple(name.strip() for name in next(csv.reader([self.labels], skipinitialspace=True)))

    @field_validator("encoding")
    @classmethod
    def _is_of_text(cls, name: str) -> str:
        try:
            found = codecs.lookup(name)
            io.TextIOWrapper(io.BytesIO(), name)  # which refuses codecs that make no text
        except (LookupError, ValueError):
            raise ValueError(
                f"data.encoding = '{name}' is no encoding of text. Give utf-8, utf-16, cp1252, latin-1, gb18030, "
                "shift_jis or any other that Python knows"
            ) from None
        return found.name

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if (names := self.label_names) is not None and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError(f"data.labels = '{self.labels}' must name two or more different labels")
        return self


PartitionScheme = Literal[
    "iid", "dirichlet", "pathological", "shard", "natural", "domain", "linear", "square", "exponential"
]


class PartitionConfig(Section):
    """Who holds what."""

    scheme: PartitionScheme = Field("iid", description="how rows are divided among clients")
    by: str | None = Field(None, description="column whose values are the clients; implies natural")
    alpha: float | None = Field(
        None, gt=0, description="concentration of dirichlet, small is skewed; if unset 0.5, and domain deals evenly"
    )
    classes_per_client: int = Field(2, ge=1, description="labels a client sees, for pathological")
    shards_per_client: int = Field(2, ge=1, description="label-sorted shards a client gets, for shard")
    min_examples: int = Field(1, ge=1, description="fewest rows a client may hold")

    @property
    def concentration(self) -> float:
        """``alpha``, or 0.5 where it is not set."""
        return 0.5 if self.alpha is None else self.alpha

    @model_validator(mode="before")
    @classmethod
    def _by_means_natural(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("by") is not None:
            scheme = values.get("scheme", "natural")
            if scheme != "natural":
                raise ValueError(
                    f"partition.by = '{values['by']}' implies partition.scheme = 'natural', but '{scheme}' was given; "
                    "drop one"
                )
            return {**values, "scheme": "natural"}
        return values

    @model_validator(mode="after")
    def _natural_needs_by(self) -> Self:
        if self.scheme == "natural" and self.by is None:
            raise ValueError("partition.scheme = 'natural' needs partition.by, the column that names each row's client")
        return self


class AdapterConfig(Section):
    """What is trained."""

    kind: AdapterKind = Field(
        "lora",
        description="lora trains A and B; ffa-lora B only, A frozen and shared; lora-xs a square R between singular "
        "vectors of the base's weights, lora-sb one between those of a gradient on public rows; rslora scales by alpha "
        "/ sqrt(rank); dora, adalora (no rank is pruned), vera, randlora, miss, loha and lokr are as in PEFT",
    )
    init: AdapterInit = Field(
        "default",
        description="how A is drawn (B starts at zero); for lora and rslora also pissa and olora, and eva and lora-ga "
        "from public rows; lora-sb-gradient, from public rows too, is that of lora-sb",
    )
    init_data: str | None = Field(
        None, description="PUBLIC rows for eva, lora-ga and lora-sb-gradient, a file or folder"
    )
    rank: int = Field(8, ge=1, description="rank r of the update; the largest of ranks, where they are given")
    ranks: Ranks | None = Field(
        None, description="ranks of the clients, dealt in turn, such as 4,8,16, for methods that merge mixed ranks"
    )
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank; not that of miss and vera")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A while training")
    targets: Names | None = Field(
        None, min_length=1, description="module names to adapt, or all-linear; query and value if unset"
    )
    head: Head | None = Field(
        None,
        description="the classifier head (with an untrained pooler): averaged (shared), kept by each client (local), "
        "or left as drawn (frozen); if unset as the method has it, which is shared for all but personalised ones",
    )

    @model_validator(mode="before")
    @classmethod
    def _rank_is_the_largest(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not values.get("ranks") or "rank" in values:
            return values
        ranks = _split_list(values["ranks"])
        if not isinstance(ranks, list | tuple):
            return values
        numbers = [int(rank) for rank in ranks if str(rank).isdecimal()]
        return {**values, "rank": max(numbers, default=1)}

    @model_validator(mode="before")
    @classmethod
    def _lora_sb_begins_at_a_gradient(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            if values.get("init") == "lora-sb-gradient" and "kind" not in values:
                return {**values, "kind": "lora-sb"}
            if values.get("kind") == "lora-sb" and values.get("init", "default") == "default":
                return {**values, "init": "lora-sb-gradient"}
        return values

    @model_validator(mode="after")
    def _ranks_agree(self) -> Self:
        if self.ranks is not None and self.rank != max(self.ranks):
            raise ValueError(
                f"adapter.rank = {self.rank} is not the largest of adapter.ranks = {','.join(map(str, self.ranks))}; "
                "give adapter.ranks alone"
            )
        return self

    @model_validator(mode="after")
    def _suits_the_kind(self) -> Self:
        if self.kind not in INITS[self.init]:
            allowed = ", ".join(init for init, kinds in INITS.items() if self.kind in kinds)
            raise ValueError(
                f"adapter.init = '{self.init}' is not for adapter.kind = '{self.kind}'. Allowed: {allowed}; "
                f"'{self.init}' goes with {', '.join(sorted(INITS[self.init]))}"
            )
        if self.init in INITS_OF_BASE and len(set(self.ranks or ())) > 1:
            raise ValueError(
                f"adapter.init = '{self.init}' takes ranks out of the base, which the clients with fewer of "
                f"adapter.ranks = {','.join(map(str, self.ranks or ()))} would miss; use another adapter.init"
            )
        if self.dropout and self.kind in WITHOUT_DROPOUT:
            raise ValueError(
                f"adapter.dropout = {self.dropout} is not for adapter.kind = '{self.kind}', which can drop no inputs; "
                "leave it at 0"
            )
        if self.init in INITS_FROM_DATA and self.init_data is None:
            what = f"adapter.init = '{self.init}'"
            without = ""
            if self.kind == "lora-sb":
                what = "adapter.kind = 'lora-sb' begins at a gradient (adapter.init = 'lora-sb-gradient'), and"
                without = "; without such rows use adapter.kind = 'lora-xs'"
            raise ValueError(
                f"{what} needs adapter.init_data: a file or folder of public rows with the run's columns{without}"
            )
        if self.init not in INITS_FROM_DATA and self.init_data is not None:
            raise ValueError(
                f"adapter.init_data = '{self.init_data}' belongs to adapter.init = "
                f"{' or '.join(repr(init) for init in sorted(INITS_FROM_DATA))}, not to '{self.init}'; drop it"
            )
        return self

    @property
    def scaling(self) -> float:
        """What the update is multiplied with."""
        return self.scaling_of(self.rank)

    def scaling_of(self, rank: int) -> float:
        """Return the scaling of a client of some rank: alpha / rank, and of rslora alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(rank) if self.kind == "rslora" else rank)


class TrainConfig(Section):
    """What a client does in a round."""

    local_steps: int | None = Field(None, ge=1, description="optimiser steps a round")
    local_epochs: int | None = Field(
        None, ge=1, description="passes over the client's rows a round; 1 if neither is set"
    )
    batch_size: int = Field(16, ge=1, description="rows a step")
    learning_rate: float = Field(1e-3, gt=0, description="step size")
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="begins afresh each round")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, L2 for sgd")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay over all rounds' steps")
    max_grad_norm: float = Field(0.0, ge=0, description="clip the whole gradient to this norm; 0 is off")
    proximal_mu: float = Field(0.0, ge=0, description="FedProx: mu/2 |w - w_global|^2")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the frozen base; adapters stay in fp32")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("train.local_steps and train.local_epochs exclude each other; give one")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"train.momentum = {self.momentum} belongs to train.optimizer = 'sgd', not '{self.optimizer}'"
            )
        return self


class StrategyConfig(BaseModel):
    """The server's method and its own options, which the method itself checks."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str = Field("lora-fair", description="see `fedpeft strategies`")

    @property
    def options(self) -> dict[str, Any]:
        """Everything in the section but the name."""
        return dict(self.__pydantic_extra__ or {})


class FederationConfig(Section):
    """How many clients, for how long."""

    clients: int | None = Field(None, ge=1, description="number of clients; a natural partition's own number")
    rounds: int = Field(10, ge=1, description="rounds of training")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the clients drawn each round")
    min_clients: int = Field(1, ge=1, description="fewest good updates that make a round")
    round_timeout: float = Field(3600.0, gt=0, description="seconds a deployment waits for a round's replies")


def cohort_size(clients: int, fraction: float, min_clients: int) -> int:
    """Return how many of the clients are drawn each round."""
    return min(clients, max(1, min_clients, round(fraction * clients)))


class SimulationConfig(Section):
    """The machine. No result depends on the number of workers; last digits may depend on threads, and on a GPU."""

    workers: int | None = Field(None, ge=0, description="Ray workers, one per core if unset; 0 trains in this process")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of a worker")
    gpus_per_worker: float = Field(0.0, ge=0, description="share of a GPU per worker")


class RunSection(Section):
    """Name, seed and what is recorded."""

    seed: int = Field(0, ge=0, lt=2**63, description="everything random follows from it")
    name: str | None = Field(None, description="folder under runs/ if --out is not given")
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations; the last is always evaluated")
    evaluate_clients: bool = Field(False, description="also score each client's share of the test rows")
    evaluate_batch_size: int = Field(64, ge=1, description="rows a batch in evaluation")
    aggregation_error: bool = Field(True, description="measure how far the sent adapter is from the mean of updates")
    checkpoint_every: int = Field(5, ge=1, description="rounds between checkpoints; the newest two are kept")


class RunConfig(Section):
    """Everything that a run depends on. The resolved file in a run directory reproduces the run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    strategy: StrategyConfig = StrategyConfig()
    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    simulation: SimulationConfig = SimulationConfig()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _truncation_is_of_prompts(self) -> Self:
        if self.data.truncate is not None and self.task != "causal-lm":
            raise ValueError(
                f"data.truncate = '{self.data.truncate}' is for prompts and completions, but the task is "
                f"'{self.task}'; drop it"
            )
        return self

    @property
    def task(self) -> Task:
        """The task named, or the one that the data's columns speak of."""
        if self.model.task is not None:
            return self.model.task
        if self.data.image is not None:
            return "image-classification"
        if self.data.completion is not None:
            return "causal-lm"
        return "sequence-classification"

    @property
    def label_column(self) -> str:
        """The column of the labels."""
        return self.data.label or "label"

    def to_toml(self) -> str:
        """Render as TOML; unset keys are left out."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def to_flat(self) -> dict[str, Scalar]:
        """Render as Flower's run config: ``section.key`` to scalar, lists joined with commas."""
        return {
            f"{section}.{key}": ",".join(map(str, value)) if isinstance(value, list) else value
            for section, table in self.model_dump(mode="json", exclude_none=True).items()
            for key, value in table.items()
        }

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> RunConfig:
        """Read what `to_flat` wrote; keys of other programs in the same table are an error too."""
        return resolve([nest(flat)])


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
            into.update(table)
    return merged


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
        if kind.model_config.get("extra") == "allow":
            continue
        for key in table:
            if key not in kind.model_fields:
                raise ConfigError(f"unknown key '{section}.{key}'. {nearest(key, kind.model_fields)}")
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make paths of existing files and folders absolute, so that a saved configuration works from any folder.

    Where rows lie in a folder of images and no column is named, that of the images is, from which follows the task.
    """

    def absolute(value: str | None) -> str | None:
        if not value:
            return value
        name, parts = divided_name(value)
        path = at(name)
        return ":".join([str(path.resolve()), *parts]) if os.path.exists(path) else value

    data, named = config.data, (config.data.text, config.data.image, config.data.prompt, config.data.completion)
    if config.model.task is None and not any(named) and is_image_folder(data.source or data.test):
        config = config.model_copy(update={"data": data.model_copy(update={"image": "image"})})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": absolute(config.model.name)}),
            "adapter": config.adapter.model_copy(update={"init_data": absolute(config.adapter.init_data)}),
            "data": config.data.model_copy(
                update={"source": absolute(config.data.source), "test": absolute(config.data.test)}
            ),
        }
    )


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
    from fedpeft.presets import layer  # which itself is typed in terms of this module

    layers = [layer(preset)] if preset else []
    layers += [read_toml(file)] if file else []
    return with_absolute_paths(resolve([*layers, nest(settings)]))


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
