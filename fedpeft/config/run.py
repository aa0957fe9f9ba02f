"""All sections of a run."""

from __future__ import annotations

from fedpeft.config.adapter import AdapterConfig
from fedpeft.config.data import DataConfig
from fedpeft.config.federation import FederationConfig, RunSection, SimulationConfig, StrategyConfig
from fedpeft.config.model import ModelConfig
from fedpeft.config.partition import PartitionConfig
from fedpeft.config.privacy import PrivacyConfig
from fedpeft.config.section import Section
from fedpeft.config.train import TrainConfig
from fedpeft.config.values import Scalar
from fedpeft.presets import PREFIX, is_preset


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
