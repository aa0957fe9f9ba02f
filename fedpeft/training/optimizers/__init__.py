"""The optimisers of the clients, one file each, and the schedules of their learning rate, one row each.

Nothing heavy is imported, and nothing of the configuration, which asks here what there is.
"""

from fedpeft.registry import Registry
from fedpeft.training.optimizers.adamw import ADAMW
from fedpeft.training.optimizers.record import Optimizer, OptimizerOptions
from fedpeft.training.optimizers.schedules import CONSTANT, COSINE, LINEAR, Schedule
from fedpeft.training.optimizers.sgd import SGD

__all__ = ["OPTIMIZERS", "SCHEDULES", "Optimizer", "OptimizerOptions", "Schedule"]

OPTIMIZERS: Registry[Optimizer] = Registry("train.optimizer", "fedpeft.optimizers", (SGD, ADAMW))
SCHEDULES: Registry[Schedule] = Registry("train.lr_schedule", "fedpeft.schedules", (CONSTANT, LINEAR, COSINE))
