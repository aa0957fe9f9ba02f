"""What a process holds for as long as it lives: the frozen base with its adapter, and the encoded rows.

Everything is made when it is first asked for and then kept, so that no message reloads a model or tokenises a row.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fedpeft import tasks
from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.agreement import agree
from fedpeft.config import (
    AdapterConfig,
    DataConfig,
    FederationConfig,
    ModelConfig,
    PartitionConfig,
    RunConfig,
    RunSection,
    TrainConfig,
)
from fedpeft.config.privacy import LEVELS, Level
from fedpeft.data.partition import Partition, partition
from fedpeft.data.sources import places
from fedpeft.data.splits import EncodedData, EncodedSplit
from fedpeft.errors import AdapterError
from fedpeft.models import base_folder, load_base
from fedpeft.presets import PREFIX, is_preset, materialize
from fedpeft.tasks.classes import max_length
from fedpeft.tasks.encoding import encode, encode_rows, encoded
from fedpeft.tasks.heads import pack_rows, runs_whole
from fedpeft.tasks.losses import needs_some_logits
from fedpeft.training.batched.layers import OwnLayers
from fedpeft.training.checkpointing import checkpoint_blocks
from fedpeft.training.neftune import check_noise
from fedpeft.training.steps import check_optimizer

T = TypeVar("T")


@dataclass(frozen=True)
class ResidentKey:
    """All that model and rows of a process depend on: runs that agree in it share them.

    Parameters
    ----------
    model, data, partition, adapter, train
        Sections of the configuration.
    clients : int, optional
        How many clients divide the rows.
    seed : int
        The run's.
    level : str
        Of privacy: private runs leave hooks on their model, which a plain run need not carry.
    canaries : int
        Rows that are planted among them.
    physical_batch_size : int, optional
        Rows that a private step works on at a time.
    """

    model: ModelConfig
    data: DataConfig
    partition: PartitionConfig
    adapter: AdapterConfig
    train: TrainConfig
    clients: int | None
    seed: int
    level: Level
    canaries: int
    physical_batch_size: int | None

    @classmethod
    def of(cls, config: RunConfig) -> ResidentKey:
        """Return a run's."""
        return cls(
            config.model,
            config.data,
            config.partition,
            config.adapter,
            config.train,
            config.federation.clients,
            config.run.seed,
            config.privacy.level,
            config.privacy.canaries,
            config.privacy.physical_batch_size,
        )

    def config(self) -> RunConfig:
        """Return a configuration of model and rows alone, whose other sections say nothing of any run."""
        return RunConfig(
            model=self.model,
            data=self.data,
            partition=self.partition,
            adapter=self.adapter,
            train=self.train,
            federation=FederationConfig(clients=self.clients),
            run=RunSection(seed=self.seed),
        )


@dataclass(frozen=True)
class Supplies:
    """Folders that stand in for what a configuration names, on a machine where its paths may lead nowhere.

    Parameters
    ----------
    model : Path
        Of the base.
    train, test : Path
        With encoded rows; no `test` where test rows are some of `train`.
    """

    model: Path
    train: Path
    test: Path | None


# who supplies what a process is to hold; empty but in workers on other nodes than the driver's
suppliers: dict[ResidentKey, Callable[[], Supplies]] = {}


class Resident:
    """Model and rows of one configuration.

    Parameters
    ----------
    config : RunConfig
        Names them.

    Attributes
    ----------
    key : ResidentKey
        What they depend on.
    config : RunConfig
        Made of `key` alone, presets' folders in place of their names. Of privacy it says nothing: see `key`.
    """

    def __init__(self, config: RunConfig) -> None:
        self.key = ResidentKey.of(config)
        self._supplies = suppliers[self.key]() if self.key in suppliers else None
        self.config = with_preset_paths(self.key.config()) if self._supplies is None else self.key.config()
        self._kept: dict[tuple[Callable[..., Any], tuple[Hashable, ...]], Any] = {}

    @cached_property
    def folder(self) -> Path:
        """Folder of the base model."""
        if self._supplies is not None:
            return self._supplies.model
        return base_folder(self.config.model)

    @cached_property
    def data(self) -> EncodedData:
        """Encoded training and test rows of the configured source."""
        if self._supplies is not None:
            return encoded(self.config, self._supplies.train, self._supplies.test)
        return encode(self.config, self.folder)

    @cached_property
    def test(self) -> EncodedSplit:
        """Encoded test rows; a server may hold these alone, and no training rows."""
        data = self.config.data
        if data.source is None and data.test is not None:
            return encode_rows(self.config, self.folder, data.test, data.label_names or (), test=True)
        return self.data.test

    @property
    def holds_out_test_rows(self) -> bool:
        """Whether test rows are some of the source that the clients' rows come from."""
        data = self.config.data
        return data.source is not None and places(data)[1] is None

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of their ids; empty where rows have none."""
        if not tasks.of(self.config).has_labels:
            return ()
        return self.config.data.label_names or self.data.labels

    @cached_property
    def partition(self) -> Partition:
        """Who holds which training rows."""
        return partition(self.config, self.data.train)

    @property
    def physical_rows(self) -> int:
        """How many rows a private step works on at a time, at most."""
        return self.key.physical_batch_size or 2 * self.config.train.batch_size

    def once(self, make: Callable[..., T], *args: Hashable) -> T:
        """Return what something above makes of this model and these rows, made when it is first asked for.

        It is kept as long as they are, and not beyond; what `make` raises is raised again for whoever asks again.

        Parameters
        ----------
        make : callable
            A function of a module, called with this object and `args`.
        *args : hashable
            Of each, another result is kept.
        """
        if (make, args) not in self._kept:
            self._kept[make, args] = make(self, *args)
        kept: T = self._kept[make, args]
        return kept

    def check(self) -> None:
        """Find model and rows and divide them, which raises what is wrong with them."""
        _ = self.folder, self.partition

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The base and its adapter, as drawn from the run's seed."""
        base = load_base(self.config, self.folder, self.labels)
        agree(base, self.config, self.test.image_shape if self._knows_rows else None)
        adapted = AdaptedModel(base, self.config)
        check_optimizer(self.config.train, adapted.trained)
        if self.config.train.gradient_checkpointing:
            checkpoint_blocks(adapted.model)
        if self.config.data.packing:
            if not (adapted.task.per_token and adapted.task.continues):
                raise AdapterError(
                    f"data.packing = true is for causal language models, and model.task = '{adapted.task.name}' is "
                    "another task. Set data.packing to false; train.bucket saves padding for any text."
                )
            pack_rows(adapted.model, max_length(self.config, self.folder))
        if self.config.train.neftune_alpha:
            check_noise(adapted.model, reads_tokens=self.test.image_shape is None)
        by_hooks = LEVELS[self.key.level].clients_add_noise
        if needs_some_logits(adapted.task) and (why := runs_whole(adapted.model, by_hooks=by_hooks)):
            adapted.notes += (f"logits of all positions are computed at once, in more memory: {why}",)
        give_back()
        return adapted

    @cached_property
    def own_layers(self) -> OwnLayers:
        """The layers of `adapted` that many clients can be run through at once, each with its own tensors."""
        return OwnLayers(self.adapted)

    @property
    def _knows_rows(self) -> bool:
        data = self.config.data
        return data.source is not None or data.test is not None


def give_back() -> None:
    """Return to the machine what is free in this process's heap: a tokenizer that was looked at leaves 70 MB there."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def with_preset_paths(config: RunConfig) -> RunConfig:
    """Replace ``preset:NAME`` as a source of rows by the folder that the preset was written to."""
    rows = {"source": config.data.source, "test": config.data.test}
    folders = {key: str(materialize(name.removeprefix(PREFIX)).data) for key, name in rows.items() if is_preset(name)}
    return config.model_copy(update={"data": config.data.model_copy(update=folders)})


_held: dict[ResidentKey, Resident] = {}


def resident(config: RunConfig) -> Resident:
    """Return this process's resident model and rows, the same object for every run that they serve."""
    key = ResidentKey.of(config)
    if key not in _held:
        _held.clear()  # a second base might not fit in memory
        _held[key] = Resident(config)
    return _held[key]
