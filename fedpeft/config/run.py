"""All sections of a run."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from fedpeft.config.adapter import AdapterConfig
from fedpeft.config.data import DataConfig
from fedpeft.config.federation import FederationConfig, RunSection, SimulationConfig, StrategyConfig
from fedpeft.config.model import ModelConfig, Task
from fedpeft.config.partition import PartitionConfig
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.config.section import Section
from fedpeft.config.train import TrainConfig
from fedpeft.config.values import Scalar
from fedpeft.presets import PREFIX, is_preset
from fedpeft.training.optimizers import OPTIMIZERS


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

    @model_validator(mode="after")
    def _optimizer_keeps_rows_private(self) -> Self:
        optimizer = OPTIMIZERS.find(self.train.optimizer)
        if optimizer.not_private and self.privacy.level == "record":
            raise ValueError(
                f"train.optimizer = '{optimizer.name}' is not for privacy.level = 'record': {optimizer.not_private}"
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
    def presets(self) -> list[str]:
        """The names of the presets that model and rows are of, sorted."""
        named = (self.model.name, self.data.source, self.data.test)
        return sorted({name.removeprefix(PREFIX) for name in named if is_preset(name)})

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
