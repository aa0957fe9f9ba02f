"""The optimisers of the clients, one file each, and the schedules of their learning rate, one row each.

Nothing heavy is imported, and nothing of the configuration, which asks here what there is.
"""

from fedpeft.registry import Registry
from fedpeft.training.optimizers.adafactor import ADAFACTOR
from fedpeft.training.optimizers.adamw import ADAMW
from fedpeft.training.optimizers.adamw_8bit import ADAMW_8BIT
from fedpeft.training.optimizers.lion import LION
from fedpeft.training.optimizers.muon import MUON
from fedpeft.training.optimizers.paged_adamw import PAGED_ADAMW
from fedpeft.training.optimizers.paged_adamw_8bit import PAGED_ADAMW_8BIT
from fedpeft.training.optimizers.record import Optimizer, OptimizerOptions
from fedpeft.training.optimizers.schedules import CONSTANT, COSINE, COSINE_BY_ROUND, LINEAR, Schedule
from fedpeft.training.optimizers.sgd import SGD

__all__ = ["OPTIMIZERS", "SCHEDULES", "Optimizer", "OptimizerOptions", "Schedule"]

OPTIMIZERS: Registry[Optimizer] = Registry(
    "train.optimizer",
    "fedpeft.optimizers",
    (SGD, ADAMW, ADAMW_8BIT, PAGED_ADAMW, PAGED_ADAMW_8BIT, ADAFACTOR, LION, MUON),
)
SCHEDULES: Registry[Schedule] = Registry(
    "train.lr_schedule", "fedpeft.schedules", (CONSTANT, LINEAR, COSINE, COSINE_BY_ROUND)
)
