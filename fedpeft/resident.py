"""What a process holds for as long as it lives: the frozen base with its adapter, and the encoded rows.

Everything is made when it is first asked for and then kept, so that no message reloads a model or tokenises a row.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft import tasks
from fedpeft.adapters.adapted import AdaptedModel
from fedpeft.agreement import agree
from fedpeft.config import FederationConfig, RunConfig, RunSection, SimulationConfig, StrategyConfig
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.data.partition import Partition, partition
from fedpeft.data.sources import places
from fedpeft.data.splits import EncodedData, EncodedSplit
from fedpeft.models import load_base, locate
from fedpeft.presets import PREFIX, is_preset, materialize
from fedpeft.privacy.canaries import Canaries, plant
from fedpeft.privacy.overlap import shared_rows
from fedpeft.tasks.encoding import encode, encode_rows

if TYPE_CHECKING:
    from fedpeft.privacy.dp_sgd import RowEngine


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

    @property
    def holds_out_test_rows(self) -> bool:
        """Whether test rows are some of the source that the clients' rows come from."""
        data = self.config.data
        return data.source is not None and places(data)[1] is None

    @cached_property
    def scored_training_rows(self) -> int:
        """How many of the given test rows are training rows too, as far as training rows are here."""
        if self.config.data.source is None or self.holds_out_test_rows:
            return 0
        return shared_rows(self.data.train, self.test)

    @cached_property
    def initial_training_rows(self) -> int:
        """How many of the rows that an adapter's start looks at are training rows too, as far as these are here."""
        given = self.config.adapter.init_data
        if self.config.data.source is None or given is None:
            return 0
        return shared_rows(self.data.train, encode_rows(self.config, self.folder, given, self.labels))

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

    @cached_property
    def canaries(self) -> Canaries | None:
        """Planted rows, which are no part of `data` and `partition`; None where none are configured."""
        if not self.config.privacy.canaries:
            return None
        return plant(self.config, self.data.train, self.partition, len(self.labels))

    @property
    def physical_rows(self) -> int:
        """How many rows a private step works on at a time, at most."""
        return self.config.privacy.physical_batch_size or 2 * self.config.train.batch_size

    def check(self) -> None:
        """Find model and rows and divide them, which raises what is wrong with them."""
        _ = self.folder, self.partition, self.canaries
        if self.config.privacy.level != "none":
            _ = self.initial_training_rows  # the statement needs it in the end, when the file may be gone

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The base and its adapter, as drawn from the run's seed."""
        base = load_base(self.config, self.folder, self.labels)
        agree(base, self.config, self.test.image_shape if self._knows_rows else None)
        return AdaptedModel(base, self.config)

    @property
    def _knows_rows(self) -> bool:
        data = self.config.data
        return data.source is not None or data.test is not None

    @cached_property
    def row_engine(self) -> RowEngine:
        """What gives the model's gradients row by row, for private training; made once rows are shown independent.

        Raises
        ------
        PrivacyError
            The model mixes rows, or gives no gradient of each.
        """
        from fedpeft.privacy.dp_sgd import RowEngine  # which loads Opacus
        from fedpeft.privacy.independence import prove_independence

        engine = RowEngine(self.adapted)
        try:
            prove_independence(self, engine)
        except BaseException:
            engine.close()  # who asks again is told again
            raise
        return engine


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
            # private runs leave hooks on their model, which a plain run need not carry
            "privacy": PrivacyConfig.model_construct(
                level=config.privacy.level,
                canaries=config.privacy.canaries,
                physical_batch_size=config.privacy.physical_batch_size,
            ),
        }
    )
    return _resident(relevant)


@lru_cache(maxsize=1)  # one: a second base might not fit in memory
def _resident(config: RunConfig) -> Resident:
    return Resident(config)
