"""The configuration of a run: one typed, frozen model, and the layers that it is made of.

Defaults < preset < TOML file < command line. Every key has a name of the form ``section.key``; what does not exist is
an error that names the nearest key that does.
"""

from fedpeft.config.adapter import AdapterConfig
from fedpeft.config.data import DataConfig, Truncate
from fedpeft.config.federation import FederationConfig, RunSection, SimulationConfig, StrategyConfig, cohort_size
from fedpeft.config.layers import (
    Layer,
    configure,
    from_flat,
    merge,
    nest,
    parse_overrides,
    read_toml,
    resolve,
    with_absolute_paths,
)
from fedpeft.config.model import ModelConfig
from fedpeft.config.partition import PartitionConfig, PartitionScheme
from fedpeft.config.run import RunConfig
from fedpeft.config.train import TrainConfig
from fedpeft.config.values import Names, Ranks, Scalar, describe

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "FederationConfig",
    "Layer",
    "ModelConfig",
    "Names",
    "PartitionConfig",
    "PartitionScheme",
    "Ranks",
    "RunConfig",
    "RunSection",
    "Scalar",
    "SimulationConfig",
    "StrategyConfig",
    "TrainConfig",
    "Truncate",
    "cohort_size",
    "configure",
    "describe",
    "from_flat",
    "merge",
    "nest",
    "parse_overrides",
    "read_toml",
    "resolve",
    "with_absolute_paths",
]
