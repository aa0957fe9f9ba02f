"""What a process holds for as long as it lives: the frozen base with its adapter, and the encoded rows.

Everything is made when it is first asked for and then kept, so that no message reloads a model or tokenises a row.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

from fedpeft.adapters import AdaptedModel
from fedpeft.config import FederationConfig, RunConfig, RunSection, SimulationConfig, StrategyConfig
from fedpeft.data.encoding import EncodedData, EncodedSplit, encode, encode_rows
from fedpeft.data.partition import Partition, partition
from fedpeft.models import load_base, locate
from fedpeft.presets import PREFIX, is_preset, materialize


class Resident:
    """Model and rows of one configuration.

    Parameters
    ----------
    config : RunConfig
        Names them.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = with_preset_paths(config)

    @cached_property
    def folder(self) -> Path:
        """Folder of the base model."""
        return locate(self.config.model)

    @cached_property
    def data(self) -> EncodedData:
        """Encoded training and test rows of the configured source."""
        return encode(self.config, self.folder)

    @cached_property
    def test(self) -> EncodedSplit:
        """Encoded test rows; a server may hold these alone, and no training rows."""
        data = self.config.data
        if data.source is None and data.test is not None:
            return encode_rows(self.config, self.folder, data.test, data.label_names or (), test=True)
        return self.data.test

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of their ids; empty for causal language modelling."""
        if self.config.task == "causal-lm":
            return ()
        return self.config.data.label_names or self.data.labels

    @cached_property
    def partition(self) -> Partition:
        """Who holds which training rows."""
        return partition(self.config, self.data.train)

    def check(self) -> None:
        """Find model and rows and divide them, which raises what is wrong with them."""
        _ = self.folder, self.partition

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The base and its adapter, as drawn from the run's seed."""
        return AdaptedModel(load_base(self.config, self.folder, self.labels), self.config)


def with_preset_paths(config: RunConfig) -> RunConfig:
    """Replace ``preset:NAME`` as a source of rows by the folder that the preset was written to."""
    rows = {"source": config.data.source, "test": config.data.test}
    folders = {key: str(materialize(name.removeprefix(PREFIX)).data) for key, name in rows.items() if is_preset(name)}
    return config.model_copy(update={"data": config.data.model_copy(update=folders)})


def resident(config: RunConfig) -> Resident:
    """Return this process's resident model and rows, the same object for every run that they serve."""
    relevant = config.model_copy(
        update={
            "strategy": StrategyConfig(),
            "federation": FederationConfig(clients=config.federation.clients),
            "simulation": SimulationConfig(),
            "run": RunSection(seed=config.run.seed),
        }
    )
    return _resident(relevant)


@lru_cache(maxsize=1)  # one: a second base might not fit in memory
def _resident(config: RunConfig) -> Resident:
    return Resident(config)
