"""The configuration of a run: one typed, frozen model, and the layers that it is made of.

Defaults < preset < TOML file < command line. Every key has a name of the form ``section.key``; what does not exist is
an error that names the nearest key that does.
"""

from fedpeft.config.adapter import AdapterConfig as AdapterConfig
from fedpeft.config.data import DataConfig as DataConfig
from fedpeft.config.data import TrainOn as TrainOn
from fedpeft.config.data import Truncate as Truncate
from fedpeft.config.federation import FederationConfig as FederationConfig
from fedpeft.config.federation import RunSection as RunSection
from fedpeft.config.federation import SimulationConfig as SimulationConfig
from fedpeft.config.federation import StrategyConfig as StrategyConfig
from fedpeft.config.federation import cohort_size as cohort_size
from fedpeft.config.layers import Layer as Layer
from fedpeft.config.layers import configure as configure
from fedpeft.config.layers import from_flat as from_flat
from fedpeft.config.layers import merge as merge
from fedpeft.config.layers import nest as nest
from fedpeft.config.layers import parse_overrides as parse_overrides
from fedpeft.config.layers import read_toml as read_toml
from fedpeft.config.layers import resolve as resolve
from fedpeft.config.layers import with_absolute_paths as with_absolute_paths
from fedpeft.config.model import ModelConfig as ModelConfig
from fedpeft.config.partition import PartitionConfig as PartitionConfig
from fedpeft.config.partition import PartitionScheme as PartitionScheme
from fedpeft.config.run import RunConfig as RunConfig
from fedpeft.config.train import TrainConfig as TrainConfig
from fedpeft.config.values import Names as Names
from fedpeft.config.values import Ranks as Ranks
from fedpeft.config.values import Scalar as Scalar
from fedpeft.config.values import describe as describe
